// What a set of keys allows as levels, and the results of a run, one per lane of a warp.
#pragma once

#include "cuda/selection/gates.cuh"
#include "cuda/selection/group.cuh"
#include "cuda/selection/narrow.cuh"

namespace sparsek::cuda {

// A bound at which more than k are left, once there is one, proves that there are more than k candidates.
template <typename Gate>
__device__ bool is_bounded(typename Gate::Level lower, int64_t count, int64_t num_keys) {
  return lower > Gate::kLowest || count > num_keys;
}

// What a set of keys allows as levels.
template <typename Gate>
struct Survey {
  typename Gate::Level lowest = Gate::kHighest;  // neither excluded nor pinned
  typename Gate::Level highest = Gate::kLowest;
  int32_t count = 0;
  int32_t pinned = 0;

  __device__ void visit(typename Gate::Level key, typename Gate::Level lower) {
    if (!(key > lower)) return;
    ++count;
    if (key == Gate::kHighest) {
      ++pinned;
    } else {
      lowest = lower_of(lowest, key);
      highest = higher_of(highest, key);
    }
  }

  __device__ void add(const Survey& other) {
    lowest = lower_of(lowest, other.lowest);
    highest = higher_of(highest, other.highest);
    count += other.count;
    pinned += other.pinned;
  }

  // Over the threads of a block: the counts alone, or everything.
  template <typename Block>
  __device__ Survey reduce_counts(Block& block) const {
    uint32_t counts[2] = {static_cast<uint32_t>(count), static_cast<uint32_t>(pinned)};
    block.sum(counts);
    Survey reduced = *this;
    reduced.count = counts[0];
    reduced.pinned = counts[1];
    return reduced;
  }
  template <typename Block>
  __device__ void reduce(Block& block) {
    *this = reduce_counts(block);
    block.bound(lowest, highest);
  }
};

constexpr int kMaxNearby = 96;  // keys that a warp looks at closely, before those of its own run

// Of one warp, in shared memory.
template <typename Gate>
struct NearbyMemory {
  uint64_t units[kMaxNearby + kWarpSize];
  typename Gate::Level keys[kMaxNearby + kWarpSize];
};

// The keys of a tile in the order of the sequence: those from before it, then its own.
template <typename Gate>
struct Tile {
  using Level = typename Gate::Level;
  using Real = typename Gate::Real;
  using Settled = typename Gate::Settled;
  Keys<Gate> keys;
  Level lower;      // bound of all results: keys count if they are above
  Level low, high;  // bounds of its finite results
  Settled settled;  // keys that are not listed
  int64_t num_keys;

  // Sums over the first `count_low` and `count_high` keys at one level each.
  template <typename Group>
  __device__ MassPair<Real> masses(Group& group, int32_t count_low, int32_t count_high, Level at_low, Level at_high,
                                   const Accuracy<Real>& accuracy) const {
    MassPair<Real> mass;
    int32_t i = group.rank;
#pragma unroll 2
    for (; i < count_low; i += Group::kSize) {
      Gate::add(keys[i], at_low, mass.first);
      Gate::add(keys[i], at_high, mass.second);
    }
#pragma unroll 1
    for (; i < count_high; i += Group::kSize) Gate::add(keys[i], at_high, mass.second);
    mass.sum(group, accuracy);
    settled.add_to(at_low, mass.first);
    settled.add_to(at_high, mass.second);
    return mass;
  }
};

// One result per lane of a warp: each follows on the one before, once one more key has entered.
template <typename Gate>
struct Run {
  using Level = typename Gate::Level;
  bool has_result;
  float share;                // of the tile's results: how far this run lies between the first and the last
  int32_t first;              // listed keys before those of this run
  int32_t count;              // listed keys of this run
  int32_t mine;               // of these, those up to this lane's
  int32_t candidates;         // keys above Tile::lower up to this lane's
  int32_t candidates_before;  // and before the run
  int32_t pinned;             // the same of pinned keys
  int32_t pinned_before;
  NearbyMemory<Gate>* nearby;
};

template <typename Gate>
__device__ typename Gate::Level solve_run(const Tile<Gate>& tile, const Run<Gate>& own) {
  using Level = typename Gate::Level;
  using Real = typename Gate::Real;
  using Settled = typename Gate::Settled;
  WarpGroup warp{static_cast<int>(threadIdx.x % kWarpSize)};
  const Level otherwise = own.pinned >= tile.num_keys ? Gate::kHighest : Gate::kLowest;
  const bool bounded = is_bounded<Gate>(tile.lower, own.candidates, tile.num_keys);
  const bool solves = own.has_result && bounded && own.pinned < tile.num_keys;
  if (!__any_sync(kAllLanes, solves)) return otherwise;

  Level low = tile.low, high = tile.high;
  const bool from_low =
      is_bounded<Gate>(tile.lower, own.candidates_before, tile.num_keys) && own.pinned_before < tile.num_keys;
  const bool from_high = __all_sync(kAllLanes, own.pinned < tile.num_keys);
  const int32_t end = own.first + own.count;
  const auto accuracy = Accuracy<Real>::of(static_cast<Real>(tile.num_keys), end, kWarpSize, 1);
  const auto masses = [&](Level at_low, Level at_high) {
    return tile.masses(warp, own.first, end, at_low, at_high, accuracy);
  };
  narrow<Gate>(masses, Gate::budget(tile.num_keys), accuracy, from_low, from_high, Gate::between(low, high, own.share),
               low, high);

  // Keys active between these bounds, then the warp's own; where there are too many, all that the tile lists.
  Settled settled = Settled::none(tile.settled.origin_within(low));
  int count = 0;
#pragma unroll 1
  for (int32_t base = 0; base < own.first; base += kWarpSize) {
    const int32_t i = base + warp.rank;
    const Level key = i < own.first ? tile.keys[i] : Gate::kLowest;
    const State state = Gate::state(key, low, high);
    settled.count(key, state);
    const unsigned active = __ballot_sync(kAllLanes, state == State::kActive);
    const int slot = count + __popc(active & lanes_before(warp.rank));
    if (state == State::kActive && slot < kMaxNearby) own.nearby->keys[slot] = key;
    count += __popc(active);
  }
  Nearby<Gate> nearby{tile.keys, own.first + own.mine, nullptr, false};
  if (count <= kMaxNearby) {
    const int listed = count + own.count;
    if (warp.rank < own.count) own.nearby->keys[count + warp.rank] = tile.keys[own.first + warp.rank];
    __syncwarp();
    nearby = {Keys<Gate>::of_levels(own.nearby->keys), count + own.mine, own.nearby->units, false};
    if constexpr (!Gate::kHard) {
      bool plain = true;
      for (int i = warp.rank; i < listed; i += kWarpSize) plain &= is_plain(own.nearby->keys[i]);
      nearby.plain = __all_sync(kAllLanes, plain);
      for (int i = warp.rank; i < listed; i += kWarpSize) {
        const Level key = own.nearby->keys[i];
        own.nearby->units[i] = nearby.plain ? to_plain(key) : fixed_point(key);
      }
    }
    __syncwarp();
    settled.reduce(warp);
    settled.add(tile.settled);
  } else {
    settled = tile.settled;
  }
  if (!solves) return otherwise;
  return Gate::solve(nearby, settled, low, high, tile.num_keys, (warp.rank + 1) / float(kWarpSize + 1));
}

}  // namespace sparsek::cuda
