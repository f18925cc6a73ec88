// Everything that a launch passes to the Hopper forward kernel.
#pragma once

#include <cstdint>

#include "cuda/forward/params.h"
#include "cuda/plan/plan.h"
#include "cuda/sm90/compact.h"

namespace sparsek::cuda::sm90 {

// Warpgroups that attend, with 64 rows of a tile each: as many as registers allow, for a warp alone waits most of the
// time.
constexpr int kForwardConsumers = 3;

struct ForwardArguments {
  ForwardParams<float> params;
  Plan plan;
  Compact compact;
  Items tiles;         // of the queries
  int64_t num_tiles;   // tile items
  int64_t packs;       // of `heads` query heads, in all
  int64_t first_pack;  // of those that this launch attends for
  int64_t work;        // tile items times such packs
  uint64_t* taken;     // [1]: how many tiles have been taken, in order of their numbers
  uint32_t* suspects;  // [tile items, packs, consumers]: a byte for each warp, not 0 where an output is not finite
  int32_t heads;       // query heads that share a tile
  float sign;          // logits are sign * magnitude * (q . k), in base 2, with magnitude > 0
  float magnitude;
};

}  // namespace sparsek::cuda::sm90
