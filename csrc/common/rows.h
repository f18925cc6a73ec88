// A strided view of a tensor's rows, plain enough for kernels.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

#include "common/host_device.h"

namespace sparsek {

// A 4-D tensor [batch, row, head, width] with any strides.
struct Rows {
  char* data;
  torch::headeronly::ScalarType dtype;
  int64_t element_size;
  int64_t stride[4];  // in elements
  int64_t width;

  SPARSEK_HOST_DEVICE char* row(int64_t batch, int64_t row, int64_t head) const {
    return data + (batch * stride[0] + row * stride[1] + head * stride[2]) * element_size;
  }
};

}  // namespace sparsek
