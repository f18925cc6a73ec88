// Forward on Hopper, for bfloat16 and float16.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/forward/params.h"
#include "cuda/plan/plan.h"

namespace sparsek::cuda {

// K and Kv up to 128, multiples of 8; last strides 1 and rows aligned to 16 bytes; `out` contiguous, in the dtype of
// the inputs or float32.
constexpr int64_t kMaxForwardWidthSm90 = 128;
constexpr int64_t kForwardRowsSm90 = 192;  // of a tile; the runs of the plan are a multiple of them
void run_forward_sm90(const ForwardParams<float>& params, const Plan& plan, const Tensor& reference,
                      int multiprocessors, cudaStream_t stream);

namespace sm90 {

struct ForwardArguments;
// `width`: of the kernels, 64 or 128. `careful`: the second pass.
template <typename Element>
void launch_forward_of(const ForwardArguments& arguments, int width, bool careful, int multiprocessors,
                       cudaStream_t stream);

}  // namespace sm90
}  // namespace sparsek::cuda
