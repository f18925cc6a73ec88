// Backward on Hopper, for bfloat16 and float16.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/backward/params.h"
#include "cuda/plan/plan.h"

namespace sparsek::cuda {

// K and Kv up to 128, multiples of 8; last strides 1 and rows aligned to 16 bytes; grad_out and the gradients in the
// dtype of the inputs; delta filled in. Memory is taken beside `reference`.
constexpr int64_t kMaxBackwardWidthSm90 = 128;
void run_backward_sm90(const BackwardParams<float>& params, const Plan& plan, const Tensor& reference,
                       int multiprocessors, cudaStream_t stream);

namespace sm90 {

struct BackwardArguments;
template <typename Element>
void launch_backward_of(const BackwardArguments& arguments, bool careful, int multiprocessors, cudaStream_t stream);

// Counts the units of the lists.
void launch_count(const BackwardArguments& arguments, cudaStream_t stream);

// Gradients of queries, keys and values, and query_sums, from the sums; key_sums where scores are NaN.
void launch_finish(const BackwardArguments& arguments, bool careful, int multiprocessors, cudaStream_t stream);

}  // namespace sm90
}  // namespace sparsek::cuda
