// Views of PyTorch tensors, and the checks and allocations that all devices share.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <string>

#include "common/rows.h"

namespace sparsek {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Rows rows_of(const Tensor& tensor);

// scores [B, Mk, G] with the scores of one head as a row, so that a row starts at any key; width Mk.
Rows score_columns(const Tensor& scores);

std::string shape_of(const Tensor& tensor);
bool is_supported(ScalarType dtype);

// Throws unless `tensor` has these sizes; -1 accepts any size.
void check_sizes(const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes);

// Throws unless `tensor` is on the device of `reference`.
void check_device(const char* name, const Tensor& tensor, const Tensor& reference);

// Contiguous tensors on the device of `reference`, uninitialised or zeroed.
Tensor make_empty(const Tensor& reference, std::initializer_list<int64_t> sizes, ScalarType dtype);
Tensor make_zeros(const Tensor& reference, std::initializer_list<int64_t> sizes, ScalarType dtype);

template <typename T>
constexpr ScalarType scalar_type() {
  return sizeof(T) == sizeof(double) ? ScalarType::Double : ScalarType::Float;
}

}  // namespace sparsek
