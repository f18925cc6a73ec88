// Views of PyTorch tensors: strided rows of any supported dtype, read and written in the dtype of computation.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>

namespace sparsek::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A 4-D tensor [batch, row, head, width] with any strides.
struct Rows {
  char* data;
  ScalarType dtype;
  int64_t element_size;
  int64_t stride[4];  // in elements
  int64_t width;

  char* row(int64_t batch, int64_t row, int64_t head) const {
    return data + (batch * stride[0] + row * stride[1] + head * stride[2]) * element_size;
  }
};

Rows rows_of(const Tensor& tensor);

// scores [B, Mk, G] with the scores of one head as a row, so that a row starts at any key; width Mk.
Rows score_columns(const Tensor& scores);

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

std::string shape_of(const Tensor& tensor);
bool is_supported(ScalarType dtype);

// Throws unless `tensor` is a CPU tensor of a supported dtype with these sizes; -1 accepts any size.
void check_tensor(const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes);

// Uninitialised or zeroed contiguous CPU tensors.
Tensor make_empty(std::initializer_list<int64_t> sizes, ScalarType dtype);
Tensor make_zeros(std::initializer_list<int64_t> sizes, ScalarType dtype);

template <typename T>
constexpr ScalarType scalar_type() {
  return sizeof(T) == sizeof(double) ? ScalarType::Double : ScalarType::Float;
}

}  // namespace sparsek::cpu
