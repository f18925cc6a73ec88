#include "cuda/common/device.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

namespace sparsek::cuda {

OnDeviceOf::OnDeviceOf(const Tensor& tensor) : guard_(tensor.get_device_index()) {
  const int32_t device = tensor.get_device_index();
  check_cuda(cudaSetDevice(device), "cudaSetDevice");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  stream_ = static_cast<cudaStream_t>(stream);
  int major = 0, minor = 0;
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
  check_cuda(cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount, device),
             "cudaDeviceGetAttribute");
  capability_ = 10 * major + minor;
}

}  // namespace sparsek::cuda
