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
  int32_t position[2];
  float reference[2];  // what logits in base 2 are taken relative to: their maximum so far, or less by up to kLeeway
  float sum[2];        // this thread's part
  bool poisoned[2];    // this thread gave weight to a value that was not finite; careful pass alone
};

// A reference before there are logits: finite, so that those of keys not seen, -inf, remain less.
constexpr float kNoReference = -FLT_MAX;

enum class Seen { kAll, kByScore, kEntering, kWindow };

// Sets the logits of keys that a row does not see to -inf: they leave the maximum, too. Returns the maxima over this
// thread's columns.
template <typename Traits, Seen kSeen>
__device__ void mask(float (&logits)[32], const typename Traits::Column& notes, int32_t window, const RowState& rows,
                     float (&highest)[2]) {
  float chains[4];  // two a row, since each maximum is a chain
#pragma unroll
  for (int j = 0; j < 8; j += 2) {
    const float4 score = *reinterpret_cast<const float4*>(&notes.score[2 * j]);
    const int4 entry = *reinterpret_cast<const int4*>(&notes.entry[2 * j]);
    const float scores[4] = {score.x, score.y, score.z, score.w};
    const int32_t entries[4] = {entry.x, entry.y, entry.z, entry.w};
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int h = e / 2 % 2, column = e / 4 * 2 + e % 2;
      bool seen = true;
      if constexpr (kSeen == Seen::kByScore || kSeen == Seen::kEntering) seen = scores[column] > rows.threshold[h];
      if constexpr (kSeen == Seen::kEntering) seen = seen && rows.position[h] >= entries[column];
      if constexpr (kSeen == Seen::kWindow)
        seen = static_cast<uint32_t>(rows.position[h] - entries[column]) < static_cast<uint32_t>(window);
      float& logit = logits[4 * j + e];
      if constexpr (kSeen != Seen::kAll) logit = seen ? logit : -INFINITY;
      chains[e % 4] = j == 0 && e < 4 ? logit : fmaxf(chains[e % 4], logit);
    }
  }
  highest[0] = fmaxf(chains[0], chains[1]);
  highest[1] = fmaxf(chains[2], chains[3]);
}

// Turns logits into weights.
template <typename Traits, bool kGated>
__device__ void weigh(float (&logits)[32], const typename Traits::Column& notes, float magnitude, RowState& rows) {
#pragma unroll
  for (int j = 0; j < 8; j += 2) {
    const float4 score = *reinterpret_cast<const float4*>(&notes.score[2 * j]);
    const float scores[4] = {score.x, score.y, score.z, score.w};
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int h = e / 2 % 2, column = e / 4 * 2 + e % 2;
      float& logit = logits[4 * j + e];
      logit = exp2_fast(fmaf(logit, magnitude, -rows.reference[h]));
      if constexpr (kGated) logit *= __saturatef(scores[column] - rows.threshold[h]);
      rows.sum[h] += logit;
    }
  }
}

}  // namespace sparsek::cuda::sm90
