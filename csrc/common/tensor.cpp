#include "common/tensor.h"

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>

#include <sstream>
#include <vector>

namespace sparsek {

Rows rows_of(const Tensor& tensor) {
  Rows rows;
  rows.data = static_cast<char*>(tensor.data_ptr());
  rows.dtype = tensor.scalar_type();
  rows.element_size = static_cast<int64_t>(tensor.element_size());
  for (int d = 0; d < 4; ++d) rows.stride[d] = tensor.stride(d);
  rows.width = tensor.size(3);
  return rows;
}

Rows score_columns(const Tensor& scores) {
  Rows rows;
  rows.data = static_cast<char*>(scores.data_ptr());
  rows.dtype = scores.scalar_type();
  rows.element_size = static_cast<int64_t>(scores.element_size());
  for (int d = 0; d < 3; ++d) rows.stride[d] = scores.stride(d);
  rows.stride[3] = scores.stride(1);
  rows.width = scores.size(1);
  return rows;
}

std::string shape_of(const Tensor& tensor) {
  std::ostringstream out;
  out << "[";
  for (int64_t d = 0; d < tensor.dim(); ++d) out << (d ? ", " : "") << tensor.size(d);
  out << "]";
  return out.str();
}

bool is_supported(ScalarType dtype) {
  return dtype == ScalarType::Double || dtype == ScalarType::Float || dtype == ScalarType::BFloat16 ||
         dtype == ScalarType::Half;
}

void check_sizes(const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes) {
  bool fits = tensor.dim() == static_cast<int64_t>(sizes.size());
  std::ostringstream expected;
  int64_t dim = 0;
  for (int64_t size : sizes) {
    expected << (dim ? ", " : "") << (size < 0 ? "*" : std::to_string(size));
    if (fits && size >= 0 && tensor.size(dim) != size) fits = false;
    ++dim;
  }
  STD_TORCH_CHECK(fits, name, " must have shape [", expected.str(), "], got ", shape_of(tensor));
}

void check_device(const char* name, const Tensor& tensor, const Tensor& reference) {
  STD_TORCH_CHECK(tensor.device() == reference.device(), name, " must be on the device of the other tensors");
}

Tensor make_empty(const Tensor& reference, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  const std::vector<int64_t> shape(sizes);
  return torch::stable::empty({shape.data(), shape.size()}, dtype, std::nullopt, reference.device());
}

Tensor make_zeros(const Tensor& reference, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  Tensor tensor = make_empty(reference, sizes, dtype);
  return torch::stable::zero_(tensor);
}

}  // namespace sparsek
