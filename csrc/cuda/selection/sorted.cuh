// Results of a tile whose own keys all arrive saturated, as where scores rise: among sorted keys with sums, each result
// takes a short search.
#pragma once

#include "cuda/selection/gates.cuh"
#include "cuda/selection/group.cuh"
#include "cuda/selection/run.cuh"

namespace sparsek::cuda {

__device__ inline void put_in_order(float& low, float& high) {
  const float lower = fminf(low, high);
  high = fmaxf(low, high);
  low = lower;
}

// Sorts over the threads of a block, each of which gets neighbours: bitonic, every merge reversing its second half.
template <int kThreads, int kKeys>
__device__ void sort(const BlockGroup<kThreads>& block, float (&keys)[kKeys], float* buffer) {
  const auto merge = [&](int size) {
#pragma unroll
    for (int stride = size; stride > 0; stride /= 2) {
#pragma unroll
      for (int i = 0; i < kKeys; ++i)
        if (!(i & stride)) put_in_order(keys[i], keys[i + stride]);
    }
  };
#pragma unroll
  for (int size = 2; size <= kKeys; size *= 2) {
#pragma unroll
    for (int i = 0; i < kKeys; ++i)
      if (const int other = i ^ (size - 1); other > i) put_in_order(keys[i], keys[other]);
    merge(size / 4);
  }
  const auto exchange = [&](int mask, bool is_lower, auto reversed) {
    float others[kKeys];
    if (mask < kWarpSize) {
#pragma unroll
      for (int i = 0; i < kKeys; ++i) others[i] = __shfl_xor_sync(kAllLanes, keys[i], mask);
    } else {
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kKeys; ++i) buffer[i * kThreads + block.rank] = keys[i];
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kKeys; ++i) others[i] = buffer[i * kThreads + (block.rank ^ mask)];
    }
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      const float other = others[reversed ? kKeys - 1 - i : i];
      keys[i] = is_lower ? fminf(keys[i], other) : fmaxf(keys[i], other);
    }
  };
#pragma unroll 1
  for (int threads = 2; threads <= kThreads; threads *= 2) {
    exchange(threads - 1, !(block.rank & threads / 2), std::true_type());
#pragma unroll 1
    for (int mask = threads / 4; mask > 0; mask /= 2) exchange(mask, !(block.rank & mask), std::false_type());
    merge(kKeys / 2);
  }
}

// Of keys in order.
struct SortedCensus : Census<float> {
  int64_t above;  // fractional scores less the lowest one, summed in plain units

  __device__ double excess(int64_t share) const {
    constexpr double kUnit = 1.0 / (int64_t{1} << kPlainBits);
    return static_cast<double>(above - (share << kPlainBits)) * kUnit;
  }
};

template <int kCapacity>
struct SortedMemory {
  uint64_t sums[kCapacity];  // of plain keys before each
  float keys[kCapacity];     // ascending, then infinity
};

template <int kCapacity>
struct SortedKeys {
  const SortedMemory<kCapacity>& memory;
  int32_t count;      // less than the capacity
  int32_t saturated;  // further keys

  // The first index whose key is not below, searched from index `from` on.
  template <typename Below>
  __device__ int32_t find(int32_t from, const Below& below) const {
    int32_t first = from, last = from;
    for (int32_t step = 1; first > 0 && !below(memory.keys[first - 1]); step *= 2) {
      last = first - 1;
      first = max(last - step + 1, 0);
    }
    for (int32_t step = 1; last < count && below(memory.keys[last]); step *= 2) {
      first = last + 1;
      last = min(last + step, count);
    }
    while (first < last) {
      const int32_t middle = (first + last) / 2;
      if (below(memory.keys[middle])) {
        first = middle + 1;
      } else {
        last = middle;
      }
    }
    return first;
  }

  // The level between low and high at which the gates sum to k, as SoftGate::solve gives it.
  __device__ float solve(float low, float high, int64_t num_keys) const {
    // It lies below the k-th highest key, but by no more than 1, and rarely touches more than two keys.
    const int32_t kth = count - static_cast<int32_t>(num_keys - saturated);
    const float key = memory.keys[kth], next = kth > 0 ? memory.keys[kth - 1] : low;
    const double soft = static_cast<double>(key) - 1;
    const float guess = next <= soft ? next : next + static_cast<float>(soft - next) / 2;
    const auto census = [&](float dropped_to, float saturated_from) {
      const int32_t begin = find(kth, [&](float x) { return x <= dropped_to; });
      const int32_t end = max(begin, find(kth, [&](float x) { return x < saturated_from; }));
      SortedCensus census;
      census.saturated = saturated + count - end;
      census.fractional = end - begin;
      census.highest_dropped = begin > 0 ? memory.keys[begin - 1] : low;
      census.lowest_saturated = memory.keys[end];
      if (begin < end) {
        census.lowest = memory.keys[begin];
        census.highest = memory.keys[end - 1];
        census.above = memory.sums[end] - memory.sums[begin] - (end - begin) * to_plain(census.lowest);
      }
      return census;
    };
    return find_root<float>(census, fmax(soft, static_cast<double>(low)), fmin(key, high), guess, num_keys);
  }
};

// Sorts keys that the memory holds, unless some are not plain.
template <int kThreads, int kCapacity>
__device__ bool sort_keys(BlockGroup<kThreads>& block, int32_t count, SortedMemory<kCapacity>& memory) {
  constexpr int kKeys = kCapacity / kThreads;
  float keys[kKeys];
  bool plain = true;
#pragma unroll
  for (int i = 0; i < kKeys; ++i) {
    const int32_t index = i * kThreads + block.rank;
    keys[i] = index < count ? memory.keys[index] : SoftGate<float>::kHighest;
    plain &= index >= count || is_plain(keys[i]);
  }
  if (!__syncthreads_and(plain)) return false;
  sort(block, keys, memory.keys);
  const int first = block.rank * kKeys;
  uint64_t sums[kKeys], total = 0;
#pragma unroll
  for (int i = 0; i < kKeys; ++i) {
    sums[i] = total;
    total += first + i < count ? to_plain(keys[i]) : 0;
  }
  const uint64_t before = block.before_thread(total);  // past a barrier: the buffer has been read
#pragma unroll
  for (int i = 0; i < kKeys; ++i) {
    memory.keys[first + i] = keys[i];
    memory.sums[first + i] = before + sums[i];
  }
  __syncthreads();
  return true;
}

// What a tile lists: keys from before it, then its own.
struct Listed {
  int32_t old, entering;
  int32_t first_result;  // result e is that after `e` keys have entered
  int32_t candidates;    // from before the tile
};

// All results of a tile; false if that takes another way. A key that has yet to enter counts as saturated, and k as one
// more: right if each key arrives saturated, since levels never fall.
template <int kThreads, int kCapacity>
__device__ bool solve_sorted(BlockGroup<kThreads>& block, const Tile<SoftGate<float>>& tile, const Listed& listed,
                             SortedMemory<kCapacity>& memory, float* results) {
  using Gate = SoftGate<float>;
  if (tile.settled.fractional > 0) return false;
  const auto load = [&](int i) { return tile.keys[i]; };
  const auto is_active = [&](float key) { return Gate::state(key, tile.low, tile.high) == State::kActive; };
  const int32_t all = listed.old + listed.entering;
  const int32_t active = compact(block, all, load, is_active, memory.keys, kCapacity);
  if (active >= kCapacity || !sort_keys(block, active, memory)) return false;
  const SortedKeys<kCapacity> sorted{memory, active, tile.settled.saturated + all - active};
  bool right = true;
#pragma unroll 1
  for (int32_t entered = listed.first_result + block.rank; entered <= listed.entering; entered += kThreads) {
    float result = Gate::kLowest;
    if (is_bounded<Gate>(tile.lower, listed.candidates + entered, tile.num_keys))
      result = sorted.solve(tile.low, tile.high, tile.num_keys + listed.entering - entered);
    results[entered] = result;
    if (entered < listed.entering) right &= tile.keys[listed.old + entered] - 1.0 >= nextafter(result, Gate::kHighest);
  }
  return __syncthreads_and(right);
}

}  // namespace sparsek::cuda
