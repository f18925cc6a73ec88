#include <algorithm>

#include "cuda/common/device.h"
#include "cuda/sm90/forward/kernel.cuh"
#include "cuda/sm90/forward/launch.h"

namespace sparsek::cuda::sm90 {

template <>
void launch_forward_of<__nv_bfloat16>(const ForwardArguments& arguments, int multiprocessors, cudaStream_t stream) {
  const int64_t width = std::max(arguments.params.query.width, arguments.params.value.width);
  if (width <= 64) return launch_forward<__nv_bfloat16, 64, 64>(arguments, multiprocessors, stream);
  launch_forward<__nv_bfloat16, 128, 128>(arguments, multiprocessors, stream);
}

}  // namespace sparsek::cuda::sm90
