// The caller's device and stream, and errors of CUDA calls.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/Exception.h>

#include "common/tensor.h"

namespace sparsek::cuda {

inline void check_cuda(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

// Makes the device of a tensor the current one, for PyTorch and for the CUDA run time of this library.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& tensor);

  cudaStream_t stream() const { return stream_; }
  int capability() const { return capability_; }  // 90 for compute capability 9.0
  int multiprocessors() const { return multiprocessors_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
  int capability_ = 0;
  int multiprocessors_ = 0;
};

}  // namespace sparsek::cuda
