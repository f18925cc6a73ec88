// Online softmax of a consumer's 64 rows over a unit, with gates.
#pragma once

#include <cfloat>
#include <cmath>

#include "cuda/sm90/accumulators.cuh"
#include "cuda/sm90/forward/traits.cuh"
#include "cuda/sm90/ptx.cuh"

namespace sparsek::cuda::sm90 {

struct RowState {
  float threshold[2];
  float reference[2];  // what logits in base 2 are taken relative to: at a maximum, until weights exceed kMostWeight
  float sum[2];        // this thread's part
  bool poisoned[2];    // this thread gave weight to a value that was not finite; careful pass alone
};

// What the weights of a row may amount to in a thread's columns of a unit, so that references seldom change: float16
// holds 16 times as much.
constexpr float kMostWeight = 4096.0f;

// A reference before there are logits, with which every weight is too high, but those of keys not seen.
constexpr float kNoReference = -FLT_MAX;

// Sets the logits of keys that a row does not see to -inf.
template <typename Traits>
__device__ void mask(float (&logits)[32], const typename Traits::Column& notes, uint32_t span,
                     const int32_t (&position)[2], const RowState& rows) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float2 score = *reinterpret_cast<const float2*>(&notes.score[2 * j]);
    const int2 entry = *reinterpret_cast<const int2*>(&notes.entry[2 * j]);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int h = e / 2;
      const bool counts = static_cast<uint32_t>(position[h] - (e % 2 ? entry.y : entry.x)) < span;
      if (!(counts && (e % 2 ? score.y : score.x) > rows.threshold[h])) logits[4 * j + e] = -INFINITY;
    }
  }
}

// Takes the logits of the rows that `fail` relative to their maximum. Returns what earlier sums are to be scaled by.
template <typename Traits>
__device__ void raise(const float (&logits)[32], const bool (&fail)[2], float magnitude, RowState& rows,
                      float (&decay)[2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float highest = -INFINITY;
#pragma unroll
    for (int i = 0; i < 32; ++i)
      if (i / 2 % 2 == h) highest = fmaxf(highest, logits[i]);
    highest = reduce_max(highest);
    decay[h] = 1.0f;
    if (!fail[h] || highest == -INFINITY) continue;
    const float reference = highest * magnitude;
    decay[h] = exp2_fast(rows.reference[h] - reference);
    rows.reference[h] = reference;
    rows.sum[h] *= decay[h];
  }
}

// Makes weights of logits, and their sums over this thread's columns.
template <typename Traits, bool kGated>
__device__ void weigh(const float (&logits)[32], const typename Traits::Column& notes, float magnitude,
                      const RowState& rows, float (&sums)[2], uint32_t (&weights)[4][4]) {
  sums[0] = sums[1] = 0.0f;
#pragma unroll
  for (int j = 0; j < 8; j += 2) {
    const float4 score = *reinterpret_cast<const float4*>(&notes.score[2 * j]);
    const float scores[4] = {score.x, score.y, score.z, score.w};
    float weight[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int h = e / 2 % 2, column = e / 4 * 2 + e % 2;
      weight[e] = exp2_fast(fmaf(logits[4 * j + e], magnitude, -rows.reference[h]));
      if constexpr (kGated) weight[e] *= __saturatef(scores[column] - rows.threshold[h]);
      sums[h] += weight[e];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) weights[j / 2][i] = pack<typename Traits::Element>(weight[2 * i], weight[2 * i + 1]);
  }
}

}  // namespace sparsek::cuda::sm90
