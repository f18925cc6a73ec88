// The result of a sequence that is not causal, found by a warp.
#pragma once

#include "cuda/selection/run.cuh"

namespace sparsek::cuda {

// The result once a block or nobody has settled a part of the keys: `count` others are left, of those surveyed.
template <typename Gate>
__device__ typename Gate::Level solve_rest(const Tile<Gate>& tile, const Survey<Gate>& survey, int32_t count,
                                           NearbyMemory<Gate>* nearby) {
  Run<Gate> run;
  run.has_result = true;
  run.share = 0;
  run.first = count;
  run.count = run.mine = 0;
  run.candidates = run.candidates_before = survey.count;
  run.pinned = run.pinned_before = survey.pinned;
  run.nearby = nearby;
  return solve_run(tile, run);
}

// Of scores [count] without NaN, in shared memory, as `nearby` is.
template <typename Gate>
__device__ typename Gate::Level solve_sequence(const typename Gate::Score* scores, int32_t count, int64_t num_keys,
                                               void* nearby) {
  WarpGroup warp{static_cast<int>(threadIdx.x % kWarpSize)};
  Tile<Gate> tile;
  tile.keys = Keys<Gate>::of_scores(scores);
  tile.lower = Gate::kLowest;
  tile.num_keys = num_keys;
  Survey<Gate> survey;
#pragma unroll 2
  for (int32_t i = warp.rank; i < count; i += kWarpSize) survey.visit(tile.keys[i], tile.lower);
  survey.reduce(warp);
  tile.low = Gate::below(survey.lowest);
  tile.high = survey.highest;
  tile.settled = Tile<Gate>::Settled::none(tile.low);
  return solve_rest(tile, survey, count, static_cast<NearbyMemory<Gate>*>(nearby));
}

// The same by a block, for its first warp: bounds that all find together leave few keys for that. `list` has `room`
// levels.
template <typename Gate, typename Block>
__device__ typename Gate::Level solve_sequence(Block& block, const typename Gate::Score* scores, int32_t count,
                                               int64_t num_keys, typename Gate::Level* list, int room,
                                               NearbyMemory<Gate>* nearby) {
  using Real = typename Gate::Real;
  Tile<Gate> tile;
  tile.keys = Keys<Gate>::of_scores(scores);
  tile.lower = Gate::kLowest;
  tile.num_keys = num_keys;
  Survey<Gate> survey;
  for (int32_t i = block.rank; i < count; i += Block::kSize) survey.visit(tile.keys[i], tile.lower);
  survey.reduce(block);
  if (survey.pinned >= num_keys) return Gate::kHighest;
  if (survey.count <= num_keys) return Gate::kLowest;
  tile.low = Gate::below(survey.lowest);
  tile.high = survey.highest;
  tile.settled = Tile<Gate>::Settled::none(tile.low);
  const auto accuracy = Accuracy<Real>::of(static_cast<Real>(num_keys), count, Block::kSize, 1);
  const auto masses = [&](typename Gate::Level at_low, typename Gate::Level at_high) {
    return tile.masses(block, count, count, at_low, at_high, accuracy);
  };
  // Where a sequence grows key by key, the result is not far above the lowest key that was left.
  narrow<Gate>(masses, Gate::budget(num_keys), accuracy, true, true, survey.lowest, tile.low, tile.high);
  auto settled = Tile<Gate>::Settled::none(tile.low);
  const auto is_active = [&](typename Gate::Level key) {
    const State state = Gate::state(key, tile.low, tile.high);
    settled.count(key, state);
    return state == State::kActive;
  };
  const int active = compact(block, count, [&](int i) { return tile.keys[i]; }, is_active, list, room);
  if (active <= room) {
    settled.reduce(block);
    tile.settled = settled;
    tile.keys = Keys<Gate>::of_levels(list);
  }
  __syncthreads();
  return block.warp() == 0 ? solve_rest(tile, survey, active <= room ? active : count, nearby) : Gate::kLowest;
}

}  // namespace sparsek::cuda
