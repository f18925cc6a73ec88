// Forward on tensor cores from sm_80 on, for bfloat16 and float16.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/forward/params.h"
#include "cuda/plan/plan.h"

namespace sparsek::cuda {

// K and Kv up to 256, multiples of 8; last strides 1 and rows aligned to 16 bytes; `out` contiguous, in any dtype.
constexpr int64_t kMaxForwardWidthSm80 = 256;
constexpr int64_t kForwardRowsSm80 = 128;  // of a tile, at most
void run_forward_sm80(const ForwardParams<float>& params, const Plan& plan, cudaStream_t stream);

namespace sm80 {

// K and Kv up to kWidth. Each instantiation is compiled in a file of its own.
template <typename T, int kWidth>
void launch_forward(const ForwardParams<float>& params, const Plan& plan, cudaStream_t stream);

}  // namespace sm80
}  // namespace sparsek::cuda
