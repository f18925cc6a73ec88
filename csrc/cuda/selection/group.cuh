// Threads that work together: a warp, or a block of them.
#pragma once

#include <cstdint>
#include <cstring>

namespace sparsek::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline unsigned lanes_before(int lane) { return (1u << lane) - 1; }

template <typename Level>
__device__ Level lower_of(Level a, Level b) {
  return b < a ? b : a;
}

template <typename Level>
__device__ Level higher_of(Level a, Level b) {
  return b > a ? b : a;
}

struct WarpGroup {
  int rank;
  static constexpr int kSize = kWarpSize;

  // Sums over all threads, modulo 2^32.
  template <int kCount>
  __device__ void sum(uint32_t (&x)[kCount]) const {
#pragma unroll
    for (uint32_t& value : x) value = __reduce_add_sync(kAllLanes, value);
  }

  __device__ void bound(float& lowest, float& highest) const {
    lowest = from_ordered(__reduce_min_sync(kAllLanes, to_ordered(lowest)));
    highest = from_ordered(__reduce_max_sync(kAllLanes, to_ordered(highest)));
  }
  template <typename Level>
  __device__ void bound(Level& lowest, Level& highest) const {
#pragma unroll 1
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
      lowest = lower_of(lowest, shuffle_xor(lowest, mask));
      highest = higher_of(highest, shuffle_xor(highest, mask));
    }
  }

 private:
  template <typename Level>
  __device__ static Level shuffle_xor(const Level& x, int mask) {
    uint32_t words[sizeof(Level) / sizeof(uint32_t)];
    memcpy(words, &x, sizeof(Level));
#pragma unroll
    for (uint32_t& word : words) word = __shfl_xor_sync(kAllLanes, word, mask);
    Level y;
    memcpy(&y, words, sizeof(Level));
    return y;
  }

  // Integers that compare as the scores do.
  __device__ static int to_ordered(float score) {
    const int bits = __float_as_int(score);
    return bits < 0 ? bits ^ 0x7fffffff : bits;
  }
  __device__ static float from_ordered(int x) { return __int_as_float(x < 0 ? x ^ 0x7fffffff : x); }
};

template <int kThreads>
struct BlockGroup {
  static constexpr int kSize = kThreads;
  static constexpr int kWarps = kThreads / kWarpSize;
  static constexpr int kSlot = 32;                     // bytes per warp
  static constexpr int kScratch = 2 * kWarps * kSlot;  // bytes
  static_assert(kWarps <= kWarpSize);

  int rank;
  char* scratch;  // [2, kWarps, kSlot] in shared memory; taking turns, one barrier per use is enough
  int turn = 0;

  __device__ int lane() const { return rank % kWarpSize; }
  __device__ int warp() const { return rank / kWarpSize; }

  template <int kCount>
  __device__ void sum(uint32_t (&x)[kCount]) {
    WarpGroup{lane()}.sum(x);
    uint32_t* sums = slots<uint32_t, kCount>();
    if (lane() == 0) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) sums[i * kWarps + warp()] = x[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = lane() < kWarps ? sums[i * kWarps + lane()] : 0;
    WarpGroup{lane()}.sum(x);
  }

  template <typename Level>
  __device__ void bound(Level& lowest, Level& highest) {
    const WarpGroup warp_group{lane()};
    warp_group.bound(lowest, highest);
    Level* bounds = slots<Level, 2>();
    if (lane() == 0) {
      bounds[warp()] = lowest;
      bounds[kWarps + warp()] = highest;
    }
    __syncthreads();
    lowest = bounds[lane() % kWarps];
    highest = bounds[kWarps + lane() % kWarps];
    warp_group.bound(lowest, highest);
  }

  // Sum of `count` over the warps before this one; `total` is that over all.
  __device__ int before_warp(int count, int& total) {
    int* counts = slots<int, 1>();
    if (lane() == 0) counts[warp()] = count;
    __syncthreads();
    const int other = lane() < kWarps ? counts[lane()] : 0;
    total = __reduce_add_sync(kAllLanes, other);
    return __reduce_add_sync(kAllLanes, lane() < warp() ? other : 0);
  }

  // Sum over the threads before this one, modulo 2^64.
  __device__ uint64_t before_thread(uint64_t x) {
    uint64_t sum = x;
#pragma unroll
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
      const uint64_t other = __shfl_up_sync(kAllLanes, sum, distance);
      if (lane() >= distance) sum += other;
    }
    uint64_t* sums = slots<uint64_t, 1>();
    if (lane() == kWarpSize - 1) sums[warp()] = sum;
    __syncthreads();
    uint64_t before = sum - x;
    for (int i = 0; i < warp(); ++i) before += sums[i];
    return before;
  }

 private:
  template <typename Value, int kCount>
  __device__ Value* slots() {
    static_assert(sizeof(Value) * kCount <= kSlot);
    turn ^= 1;
    return reinterpret_cast<Value*>(scratch + turn * kWarps * kSlot);
  }
};

// Copies those of load(0), ..., load(length - 1) that keep() to `out`, in order, and returns how many there are; past
// `room` they are counted only. `out` may overlap what load reads if it starts no later.
template <int kThreads, typename Value, typename Load, typename Keep>
__device__ int compact(BlockGroup<kThreads>& block, int length, const Load& load, const Keep& keep, Value* out,
                       int room) {
  constexpr int kMaxSteps = 4;
  int filled = 0;
#pragma unroll 1
  for (int begin = 0; begin < length; begin += kMaxSteps * kThreads) {
    const int left = length - begin, steps = (left + kThreads - 1) / kThreads;  // the warps share what is left
    const int first = begin + block.warp() * (steps < kMaxSteps ? steps : kMaxSteps) * kWarpSize + block.lane();
    Value values[kMaxSteps];
    unsigned kept[kMaxSteps];
    int count = 0;
#pragma unroll
    for (int step = 0; step < kMaxSteps; ++step) {
      const int i = first + step * kWarpSize;
      const bool valid = step < steps && i < length;
      if (valid) values[step] = load(i);
      kept[step] = __ballot_sync(kAllLanes, valid && keep(values[step]));
      count += __popc(kept[step]);
    }
    int total;
    int slot = filled + block.before_warp(count, total);
#pragma unroll
    for (int step = 0; step < kMaxSteps; ++step) {
      const int own = slot + __popc(kept[step] & lanes_before(block.lane()));
      if ((kept[step] >> block.lane() & 1) && own < room) out[own] = values[step];
      slot += __popc(kept[step]);
    }
    filled += total;
  }
  __syncthreads();
  return filled;
}

}  // namespace sparsek::cuda
