// The derivative of softmax at the pairs of a consumer's 64 keys and a tile of queries. A thread holds two keys:
// elements 4 j, 4 j + 1 are queries 8 j + 2 (lane % 4) and the next of its first key, 4 j + 2 and 4 j + 3 the same of
// the key 8 below.
#pragma once

#include "cuda/sm90/backward/traits.cuh"
#include "cuda/sm90/ptx.cuh"

namespace sparsek::cuda::sm90 {

// How gates come about. kOpen: all of them are 1; kSoft: by scores; kEntering: the same, but some keys count from a
// position within the tile on only.
enum class Gates { kOpen, kWindow, kSoft, kEntering, kHard };

struct KeyState {
  float score[2];
  float soft_score[2];
  int32_t from[2];
};

// The LSE of this thread's first queries: read ahead, since shared memory is busy while products are made.
constexpr int kReadAhead = 8;
template <int kRows>
__device__ __forceinline__ void read_lse(const TileRows<kRows>& rows, float2 (&lse)[kReadAhead]) {
#pragma unroll
  for (int j = 0; j < kReadAhead; ++j)
    lse[j] = *reinterpret_cast<const float2*>(&rows.lse[8 * j + 2 * (threadIdx.x % 4)]);
}

// Replaces logits, which are not scaled, by softmax weights over gates.
template <int kRows>
__device__ __forceinline__ void exponentiate(float (&logits)[kRows / 2], const TileRows<kRows>& rows,
                                             const float2 (&ahead)[kReadAhead], float scale) {
  const int column = 2 * (threadIdx.x % 4);
#pragma unroll
  for (int j = 0; j < kRows / 8; ++j) {
    const float2 lse = j < kReadAhead ? ahead[j] : *reinterpret_cast<const float2*>(&rows.lse[8 * j + column]);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      float& logit = logits[4 * j + e];
      logit = exp2_fast(fmaf(logit, scale, e % 2 ? -lse.y : -lse.x));
    }
  }
}

// Sums of four pairs of queries over the eight lanes that hold the same ones: leaves one in each lane.
__device__ __forceinline__ float reduce(float (&sums)[8]) {
#pragma unroll
  for (int count = 4; count >= 1; count /= 2) {
    const int mask = 4 * count;
    const bool high = threadIdx.x & mask;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const float give = high ? sums[i] : sums[i + count], keep = high ? sums[i + count] : sums[i];
      sums[i] = keep + __shfl_xor_sync(~0u, give, mask);
    }
  }
  return sums[0];
}
// Which of 32 queries that is.
__device__ __forceinline__ int query_of_sums() {
  const int lane = threadIdx.x % 32;
  return (lane >> 4 & 1) * 16 + (lane >> 3 & 1) * 8 + lane % 4 * 2 + (lane >> 2 & 1);
}

// Makes of ungated weights, and of the gradients of weights, two left factors: weights and gradients of logits, both
// exactly 0 where a pair is not seen. Adds the gradients of fractional gates to the sums of their keys, and leaves the
// sums of queries, as reduce() does, of 32 after 32.
template <typename Traits, Gates kGates>
__device__ __forceinline__ void differentiate(const float (&weights)[Traits::kRows / 2],
                                              const float (&grads)[Traits::kRows / 2], float (&key_sums)[2],
                                              float (&query_sums)[Traits::kRows / 32],
                                              uint32_t (&weight_factor)[Traits::kRows / 16][4],
                                              uint32_t (&grad_factor)[Traits::kRows / 16][4],
                                              const TileRows<Traits::kRows>& rows, const KeyState& keys,
                                              int32_t first_position, int32_t window) {
  constexpr bool kSums = kGates == Gates::kSoft || kGates == Gates::kEntering || kGates == Gates::kHard;
  float sums[8];
  const int column = 2 * (threadIdx.x % 4);
#pragma unroll
  for (int j = 0; j < Traits::kRows / 8; ++j) {
    if (j % 2 == 0) asm volatile("" ::: "memory");  // reads few rows ahead: registers are scarce
    const int c = 8 * j + column;
    const float2 delta = *reinterpret_cast<const float2*>(&rows.delta[c]);
    const float2 threshold = *reinterpret_cast<const float2*>(&rows.threshold[c]);
    const float2 soft_threshold = *reinterpret_cast<const float2*>(&rows.soft_threshold[c]);
    float weight[4], grad[4];
    sums[2 * (j % 4)] = sums[2 * (j % 4) + 1] = 0.0f;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int h = e / 2;
      float ungated = weights[4 * j + e], change = grads[4 * j + e] - (e % 2 ? delta.y : delta.x), gate = 1.0f;
      bool seen = true;
      if constexpr (kGates == Gates::kWindow) {
        const int32_t position = first_position + c + e % 2;
        seen = static_cast<uint32_t>(position - keys.from[h]) < static_cast<uint32_t>(window);
        if constexpr (Traits::kCareful) {  // else the weights of a query that does not exist are 0
          const float by = e % 2 ? threshold.y : threshold.x;
          seen = seen && by == by;
        }
      } else if constexpr (kGates != Gates::kOpen) {
        gate = __saturatef(keys.score[h] - (e % 2 ? threshold.y : threshold.x));
        if constexpr (kGates != Gates::kSoft) gate = first_position + c + e % 2 >= keys.from[h] ? gate : 0.0f;
        seen = gate > 0.0f;
      }
      if constexpr (kGates != Gates::kOpen) ungated = seen ? ungated : 0.0f;
      if constexpr (Traits::kCareful) change = seen ? change : 0.0f;
      const float grad_gate = ungated * change;
      if constexpr (kSums) {
        bool fractional = gate < 1.0f;
        if constexpr (kGates == Gates::kHard) {
          const float above = keys.soft_score[h] - (e % 2 ? soft_threshold.y : soft_threshold.x);
          fractional = above > 0.0f && above < 1.0f;
        }
        const float sum = fractional ? grad_gate : 0.0f;
        key_sums[h] += sum;
        sums[2 * (j % 4) + e % 2] += sum;
      }
      weight[e] = gate * ungated;
      grad[e] = gate * grad_gate;
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {  // columns of a left factor share registers in pairs
      weight_factor[j / 2][j % 2 * 2 + h] = pack<typename Traits::Element>(weight[2 * h], weight[2 * h + 1]);
      grad_factor[j / 2][j % 2 * 2 + h] = pack<typename Traits::Element>(grad[2 * h], grad[2 * h + 1]);
    }
    if (j % 4 == 3) query_sums[j / 4] = kSums ? reduce(sums) : 0.0f;
  }
}

}  // namespace sparsek::cuda::sm90
