// Launches of kernels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

#include "cuda/common/device.h"

namespace sparsek::cuda {

// Any number of CTAs, none included, in one dimension: the others end at 65535.
template <typename... Params, typename... Args>
void launch(const char* name, void (*kernel)(Params...), int64_t ctas, int threads, size_t shared_bytes,
            cudaStream_t stream, const Args&... args) {
  if (ctas == 0) return;
  STD_TORCH_CHECK(ctas <= std::numeric_limits<int32_t>::max(), name, " needs ", ctas, " CTAs");
  if (shared_bytes > 48 * 1024)
    check_cuda(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
        name);
  kernel<<<static_cast<unsigned>(ctas), threads, shared_bytes, stream>>>(args...);
  check_cuda(cudaGetLastError(), name);
}

// The dynamic shared memory of a CTA.
template <typename Shared>
__device__ Shared& shared_memory() {
  extern __shared__ __align__(128) char bytes[];
  return *reinterpret_cast<Shared*>(bytes);
}

}  // namespace sparsek::cuda
