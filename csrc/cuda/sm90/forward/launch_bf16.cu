#include "cuda/sm90/forward/kernel.cuh"

namespace sparsek::cuda::sm90 {

template <>
void launch_forward_of<__nv_bfloat16>(const ForwardArguments& arguments, int width, bool careful, int multiprocessors,
                                      cudaStream_t stream) {
  launch_pass_of<__nv_bfloat16>(arguments, width, careful, multiprocessors, stream);
}

}  // namespace sparsek::cuda::sm90
