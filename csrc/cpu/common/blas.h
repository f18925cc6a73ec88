// Matrix products of small buffers through the BLAS that PyTorch brings.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>

#include "cpu/common/tensor.h"

namespace sparsek::cpu {

// A strided matrix in somebody else's memory.
template <typename T>
struct Matrix {
  T* data;
  int64_t rows;
  int64_t cols;
  int64_t row_stride;
  int64_t col_stride = 1;

  Matrix transposed() const { return {data, cols, rows, col_stride, row_stride}; }
};

template <typename T>
Tensor as_tensor(const Matrix<T>& m) {
  const std::array<int64_t, 2> sizes{m.rows, m.cols};
  const std::array<int64_t, 2> strides{m.row_stride, m.col_stride};
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(
      m.data, 2, sizes.data(), strides.data(), 0,
      scalar_type<T>() == ScalarType::Double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32(),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// out = a b, or out += a b. Must not be called with empty matrices.
template <typename T>
void multiply(const Matrix<T>& out, const Matrix<T>& a, const Matrix<T>& b, bool accumulate) {
  const Tensor result = as_tensor(out);
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(result.get(), result.get(), as_tensor(a).get(), as_tensor(b).get(),
                                                  accumulate ? 1.0 : 0.0, 1.0));
}

}  // namespace sparsek::cpu
