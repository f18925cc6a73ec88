// Everything the forward kernels read and write.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/common/params.h"

namespace sparsek::cuda {

template <typename T>
struct ForwardParams : AttentionParams<T> {
  Rows out;  // [B, Mq, H, Kv]
  T* lse;    // [B, H, Mq]
};

// Every dtype, width and stride, without tensor cores.
template <typename T>
void run_forward_simt(const ForwardParams<T>& params, cudaStream_t stream);

}  // namespace sparsek::cuda
