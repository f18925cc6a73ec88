// Everything that a launch passes to the Hopper forward kernel.
#pragma once

#include <cstdint>

#include "cuda/forward/params.h"
#include "cuda/plan/plan.h"

namespace sparsek::cuda::sm90 {

struct ForwardArguments {
  ForwardParams<float> params;
  Plan plan;
  Items tiles;         // of the queries
  int64_t num_tiles;   // tile items
  int64_t work;        // tile items times packs of heads
  uint64_t* suspects;  // [work]: a byte for each warp of the consumers, not 0 where an output is not finite
  int32_t heads;       // query heads that share a tile
  float sign;          // logits are sign * magnitude * (q . k), in base 2, with magnitude > 0
  float magnitude;
};

}  // namespace sparsek::cuda::sm90
