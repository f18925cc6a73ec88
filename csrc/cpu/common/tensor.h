// Rows of any supported dtype, read and written in the dtype of computation.
#pragma once

#include "common/tensor.h"

namespace sparsek::cpu {

// Reads `count` rows times `factor` into out [count, width], and whether all elements of each are finite.
template <typename T>
void load_rows(const Rows& rows, const char* const* row, int64_t count, T factor, T* out, bool* finite);

// Reads one row.
template <typename T>
void load_row(const Rows& rows, const char* row, T factor, T* out) {
  bool finite;
  load_rows(rows, &row, 1, factor, out, &finite);
}

// Writes `width` elements of `in` times `factor`.
template <typename T>
void store_row(const Rows& rows, char* row, T factor, const T* in);

// scores [B, Mk, G] of any dtype as contiguous [B, G, Mk] of T.
template <typename T>
Tensor transpose_scores(const Tensor& scores);

}  // namespace sparsek::cpu
