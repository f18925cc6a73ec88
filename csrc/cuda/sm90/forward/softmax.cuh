// Online softmax of a consumer's 64 rows, with gates. A thread holds two rows of the products: elements 4 j, 4 j + 1
// are columns 8 j + 2 (lane % 4) and the next of its first row, 4 j + 2 and 4 j + 3 the same of the row 8 below.
#pragma once

#include <cmath>

#include "cuda/sm90/forward/traits.cuh"
#include "cuda/sm90/ptx.cuh"

namespace sparsek::cuda::sm90 {

enum class Unit { kSolid, kSeen, kGated, kEntering, kWindow };

struct RowState {
  float threshold[2];
  int32_t position[2];
  float maximum[2];  // of the logits times `sign`
  float sum[2];      // this thread's part
  bool poisoned[2];  // this thread gave weight to a value that was not finite; careful pass alone
};

__device__ inline float reduce_max(float x) {  // over the four threads of a row
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ inline float reduce_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// Turns logits into weights relative to the new maxima; returns in `decay` what earlier sums are to be scaled by.
template <typename Traits, Unit kUnit>
__device__ void weigh(float (&logits)[64], const typename Traits::Notes& notes, int32_t window, float magnitude,
                      RowState& rows, float (&decay)[2]) {
  const int column = 2 * (threadIdx.x % 4);
  float maximum[2] = {rows.maximum[0], rows.maximum[1]};
  // Keys that a row does not see leave the maximum too.
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    if (j % 4 == 0) asm volatile("" ::: "memory");  // reads few scores ahead, and again below: registers are scarce
    const float2 score = *reinterpret_cast<const float2*>(&notes.score[8 * j + column]);
    const int2 entry = *reinterpret_cast<const int2*>(&notes.entry[8 * j + column]);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int h = e / 2;
      bool seen = true;
      if constexpr (kUnit == Unit::kGated || kUnit == Unit::kEntering)
        seen = __saturatef((e % 2 ? score.y : score.x) - rows.threshold[h]) > 0.0f;
      const int32_t from = e % 2 ? entry.y : entry.x;
      if constexpr (kUnit == Unit::kEntering) seen = seen && rows.position[h] >= from;
      if constexpr (kUnit == Unit::kWindow) seen = from <= rows.position[h] && rows.position[h] - window < from;
      float& logit = logits[4 * j + e];
      if constexpr (kUnit != Unit::kSolid && kUnit != Unit::kSeen) logit = seen ? logit : -INFINITY;
      maximum[h] = fmaxf(maximum[h], logit);
    }
  }
  float shift[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    maximum[h] = reduce_max(maximum[h]);
    shift[h] = maximum[h] == -INFINITY ? 0.0f : maximum[h] * magnitude;
    decay[h] = exp2_fast(rows.maximum[h] * magnitude - shift[h]);
    rows.maximum[h] = maximum[h];
    rows.sum[h] *= decay[h];
  }
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    if (j % 4 == 0) asm volatile("" ::: "memory");  // reads few scores ahead, and again below: registers are scarce
    const float2 score = *reinterpret_cast<const float2*>(&notes.score[8 * j + column]);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int h = e / 2;
      float& logit = logits[4 * j + e];
      logit = exp2_fast(fmaf(logit, magnitude, -shift[h]));
      if constexpr (kUnit != Unit::kSolid && kUnit != Unit::kWindow)
        logit *= __saturatef((e % 2 ? score.y : score.x) - rows.threshold[h]);
      rows.sum[h] += logit;
    }
  }
}

}  // namespace sparsek::cuda::sm90
