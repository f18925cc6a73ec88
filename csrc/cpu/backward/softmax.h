// The derivative of one row of softmax over the columns that its query sees.
#pragma once

#include <cstdint>

#include "cpu/selection/tile.h"

namespace sparsek::cpu {

template <typename T>
struct RowState {
  int32_t position;
  T threshold;
  T lse;
  T delta;  // rowsum(grad_out * out) - grad_lse
};

// Replaces logits by softmax weights and grad_weights (grad_out . value) by the gradient of the logits, both 0 where
// the column is not seen. Adds the gradient of each fractional gate to key_sums, and returns their sum over the
// columns.
template <typename T>
T differentiate(T* logits, T* grad_weights, const Columns<T>& columns, int64_t count, const RowState<T>& row, bool hard,
                T* key_sums);

}  // namespace sparsek::cpu
