// The derivative of softmax at one pair of a query and a key.
#pragma once

#include <cfloat>
#include <cstdint>
#include <limits>

#include "cuda/common/ptx.cuh"
#include "cuda/plan/plan.h"

namespace sparsek::cuda::sm80 {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kLog2e = 1.4426950408889634f;

// How the gates of a tile of pairs come about.
enum class Gates { kOpen, kWindow, kSoft, kHard };  // kOpen: all of them are 1

struct RowState {
  float lse;  // in base 2
  float delta;
  float threshold;       // what the gates of listed keys are measured by; NaN: sees none of them
  float soft_threshold;  // what decides whether a gate is fractional, for hard selection
};

// A row that does not exist, or whose query comes before every key: no weight at all.
__device__ __forceinline__ RowState no_row() { return {kInfinity, 0.0f, kNan, kNan}; }

// `position` counts from the start of the run.
__device__ __forceinline__ RowState make_row(float lse, float delta, float threshold, const Pattern& pattern,
                                             int32_t position) {
  RowState row{kLog2e * lse, delta, threshold, threshold};
  // Pinned keys have gate 1 also where they take all of k.
  if (row.threshold == kInfinity) row.threshold = FLT_MAX;
  if (pattern.hard && row.threshold == row.threshold)
    row.threshold = pattern.causal ? static_cast<float>(position) : 0.0f;
  return row;
}

struct SlotState {
  float score;       // what the gate is measured by
  float soft_score;  // of the key, for hard selection
  int32_t from;      // listed: the first position that sees it by its score; in a window: the key
};

// Replaces a logit (not scaled) by the softmax weight and grad_weight by the gradient of the logit, both exactly 0
// where the pair is not seen. Adds the gradient of a fractional gate to `gate_sum`.
template <Gates kGates>
__device__ __forceinline__ void differentiate(float& logit, float& grad_weight, float& gate_sum, const RowState& row,
                                              const SlotState& slot, int32_t position, int32_t window, float scale) {
  float ungated = exp2_fast(fmaf(logit, scale, -row.lse));  // softmax weight over gate
  float change = grad_weight - row.delta;
  float gate = 1.0f;
  bool seen = true;
  if constexpr (kGates == Gates::kWindow) {
    seen = static_cast<uint32_t>(position - slot.from) < static_cast<uint32_t>(window);
  } else if constexpr (kGates != Gates::kOpen) {
    gate = position >= slot.from ? __saturatef(slot.score - row.threshold) : 0.0f;
    seen = gate > 0.0f;
  }
  // Both, for either may be NaN or infinite.
  ungated = seen ? ungated : 0.0f;
  change = seen ? change : 0.0f;
  const float grad_gate = ungated * change;
  if constexpr (kGates == Gates::kSoft) {
    if (gate < 1.0f) gate_sum += grad_gate;
  } else if constexpr (kGates == Gates::kHard) {
    const float above = slot.soft_score - row.soft_threshold;
    if (above > 0.0f && above < 1.0f) gate_sum += grad_gate;
  }
  logit = gate * ungated;
  grad_weight = gate * grad_gate;
}

}  // namespace sparsek::cuda::sm80
