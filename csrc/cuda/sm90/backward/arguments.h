// Everything that a launch passes to the Hopper backward kernels.
#pragma once

#include <cstdint>

#include "cuda/backward/params.h"
#include "cuda/plan/plan.h"

namespace sparsek::cuda::sm90 {

constexpr int kKeys = 128;       // of a unit: 64 for each consumer
constexpr int kTileSums = 8192;  // of the queries of a tile
constexpr int kPartialSums = 8;  // of a row's gate gradients: one for each warp of the consumers
constexpr int tile_rows(int width) { return kTileSums / width; }
constexpr int tile_floats(int width) { return kTileSums + kPartialSums * tile_rows(width); }

struct BackwardArguments {
  BackwardParams<float> params;
  Plan plan;
  Items tiles;         // of the queries
  int64_t num_tiles;   // tile items, per query head
  int64_t num_runs;    // run items
  int64_t num_blocks;  // items of kKeys keys each, for windows
  bool windows;        // units are blocks of keys in windows, else of lists
  int32_t width;       // of the kernels: 64 or 128
  // The sums behind the gradients of the queries, as the accumulators lie, and 8 partial sums of each row's gate
  // gradients: [H, tile items], the tiles of each batch entry's sequences after those of the entry before.
  float* tile_sums;
  float* grad_key;      // [B, G, Mk, K]: sums, not scaled; written where a query sees the key
  float* grad_value;    // [B, G, Mk, Kv]
  int32_t* first_unit;  // [runs * packs of groups + 1]: of the lists, before each; later runs first
  int32_t* ticket;      // [1]: the next unit
  int32_t* added;       // [runs, G]: how many units of a run have added their sums
  int32_t* turns;       // [H, tile items]: 1 + the unit that was the last to add to a tile; 0: none yet
  int32_t* window_turns;
  int32_t* suspects;  // [B * G + 1]: not 0 where something of the group, or at last of any, is not finite
};

}  // namespace sparsek::cuda::sm90
