// Everything that a launch passes to Hopper's kernel for short sequences.
#pragma once

#include <cstdint>

#include "cuda/forward/params.h"

namespace sparsek::cuda::sm90 {

// Bytes from a query, or a query head of a pack, to the next.
struct RowSteps {
  uint32_t query, head;
};

// Rows are the queries of a pack of heads: row r is query r / heads and query head r % heads of the pack. `scores` of
// the parameters is not set: the kernel reads the columns.
struct ShortForwardArguments {
  ForwardParams<float> params;
  Rows columns;        // of the scores [B, Mk, G]
  int32_t log_heads;   // of a pack, query heads of one group
  int64_t packs;       // of a group
  int64_t rows;        // of a pack
  int64_t splits;      // CTAs that share the rows of a pack
  int64_t split_rows;  // of a CTA, a multiple of the rows that it attends with at once
  RowSteps query_steps, out_steps;
  float factor;  // logits are factor * (q . k), in base 2
};

}  // namespace sparsek::cuda::sm90
