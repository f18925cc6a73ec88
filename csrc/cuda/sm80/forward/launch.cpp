// Chooses the instantiation of the kernel.
#include "cuda/sm80/forward/launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

namespace sparsek::cuda {
namespace {

template <typename T>
void run_as(const ForwardParams<float>& params, const Plan& plan, cudaStream_t stream) {
  const int64_t width = std::max(params.key.width, params.value.width);
  const auto launch = width <= 64    ? sm80::launch_forward<T, 64>
                      : width <= 128 ? sm80::launch_forward<T, 128>
                      : width <= 192 ? sm80::launch_forward<T, 192>
                                     : sm80::launch_forward<T, 256>;
  launch(params, plan, stream);
}

}  // namespace

void run_forward_sm80(const ForwardParams<float>& params, const Plan& plan, cudaStream_t stream) {
  const auto run = params.query.dtype == ScalarType::BFloat16 ? run_as<__nv_bfloat16> : run_as<__half>;
  run(params, plan, stream);
}

}  // namespace sparsek::cuda
