// The softmax of one row of logits over the columns that its query sees.
#pragma once

#include <cstdint>

#include "cpu/selection/tile.h"

namespace sparsek::cpu {

// The largest logit among the columns seen from `position`; -inf if there is none.
template <typename T>
T seen_max(const T* logits, const Columns<T>& columns, int64_t count, int32_t position);

// Replaces each logit by gate * exp(logit - maximum), 0 where the column is not seen, and returns their sum.
template <typename T>
T weigh(T* logits, const Columns<T>& columns, int64_t count, int32_t position, T threshold, bool hard, T maximum);

}  // namespace sparsek::cpu
