// Everything that a launch passes to Hopper's kernel for short sequences.
#pragma once

#include <cstdint>

#include "cuda/forward/params.h"
#include "cuda/sm90/tile_map.h"

namespace sparsek::cuda::sm90 {

constexpr int32_t kShortTileRows = 64;  // of a consumer

// Rows are the queries of a pack of heads: row r is query r / heads and query head r % heads of the pack. `scores` of
// the parameters is not set: the kernel reads the columns.
struct ShortForwardArguments {
  ForwardParams<float> params;
  Rows columns;         // of the scores [B, Mk, G]
  int32_t log_heads;    // of a pack, query heads of one group
  int64_t packs;        // of a group
  int64_t rows;         // of a pack
  int64_t jobs;         // [B, G, packs, splits]
  int64_t splits;       // jobs that share the rows of a pack
  int64_t job_rows;     // a multiple of the rows that are attended with at once
  CUtensorMap queries;  // tiles of a consumer
  CUtensorMap out;      // tiles of a warp, where out has the dtype of the inputs
  float factor;         // logits are factor * (q . k), in base 2
};

}  // namespace sparsek::cuda::sm90
