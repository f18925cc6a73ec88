// The keys that a tile of queries sees.
#pragma once

#include "cuda/simt/tile.cuh"

namespace sparsek::cuda::simt {

// Gathers, kTile at a time and in ascending order: the keys that the tile's first query still sees, then, if causal,
// those at the tile's own positions. A key's place depends on nothing after it, so what a query computes does not
// depend on later tokens either, down to the last bit.
class KeyScan {
 public:
  static constexpr int kPerThread = 4;
  static constexpr int kStep = kThreads * kPerThread;  // keys looked at together
  static constexpr int kWarps = kThreads / 32;

  struct Memory {
    int32_t list[kTile + kStep];
    int32_t warp_counts[kWarps];
  };

  // expiry [keys of the sequence]. Shared memory serves one scan after the other.
  __device__ KeyScan(Memory& memory, const QueryTile& tile, const int32_t* expiry, bool causal)
      : memory_(memory), expiry_(expiry), first_(tile.first), causal_(causal) {
    const int64_t last = static_cast<int64_t>(tile.first) + tile.count;
    end_ = causal && last < tile.sequence.keys ? last : tile.sequence.keys;
  }

  // Goes to the next keys; false after the last. For all threads of the CTA together.
  __device__ bool next() {
    begin_ += taken_;
    if (count_ - begin_ < kTile && next_ < end_) refill();
    taken_ = count_ - begin_ < kTile ? count_ - begin_ : kTile;
    return taken_ > 0;
  }

  // The i-th of the keys it went to, or -1.
  __device__ int32_t key(int i) const { return i < taken_ ? memory_.list[begin_ + i] : -1; }

 private:
  __device__ void refill() {
    const int thread = static_cast<int>(threadIdx.x);
    const int rest = count_ - begin_;
    const int32_t kept = thread < rest ? memory_.list[begin_ + thread] : 0;
    __syncthreads();
    if (thread < rest) memory_.list[thread] = kept;
    begin_ = 0;
    count_ = rest;
    while (count_ < kTile && next_ < end_) append();
  }

  __device__ void append() {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int64_t start = next_ + static_cast<int64_t>(threadIdx.x) * kPerThread;
    bool alive[kPerThread];
    int count = 0;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int64_t key = start + i;
      const int64_t from = causal_ ? (key > first_ ? key : first_) : 0;  // the first query that may see it
      alive[i] = key < end_ && expiry_[key] > from;
      count += alive[i];
    }
    int through = count;  // keys of the warp's threads up to this one
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int before = __shfl_up_sync(kAllLanes, through, offset);
      if (lane >= offset) through += before;
    }
    if (lane == 31) memory_.warp_counts[warp] = through;
    __syncthreads();
    int slot = count_ + through - count;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      slot += w < warp ? memory_.warp_counts[w] : 0;
      count_ += memory_.warp_counts[w];
    }
#pragma unroll
    for (int i = 0; i < kPerThread; ++i)
      if (alive[i]) memory_.list[slot++] = static_cast<int32_t>(start + i);
    next_ += kStep;
    __syncthreads();
  }

  Memory& memory_;
  const int32_t* expiry_;
  const int32_t first_;
  const bool causal_;
  int64_t end_;
  int64_t next_ = 0;  // the first key not looked at
  int begin_ = 0;     // of the list
  int taken_ = 0;
  int count_ = 0;
};

}  // namespace sparsek::cuda::simt
