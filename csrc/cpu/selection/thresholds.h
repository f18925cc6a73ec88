// Thresholds and expiries of one sequence and key/value head, by one scan over its scores.
#pragma once

#include <cstdint>

#include "common/pattern.h"

namespace sparsek::cpu {

struct ThresholdParams {
  Pattern pattern;
  int64_t num_keys;  // k
  int64_t keys;      // Mk
  int64_t queries;   // Mq
};

// T is the dtype of the thresholds: float, or double for double scores. Linear in the keys, but for a factor log k.
//   scores    [keys]: no NaN
//   threshold [queries], expiry [keys]: see common/pattern.h
template <typename T>
void find_thresholds(const ThresholdParams& params, const double* scores, T* threshold, int32_t* expiry);

}  // namespace sparsek::cpu
