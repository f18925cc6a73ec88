#include "cuda/sm90/backward/kernel.cuh"

namespace sparsek::cuda::sm90 {

template <>
void launch_backward_of<__nv_bfloat16>(const BackwardArguments& arguments, bool careful, int multiprocessors,
                                       cudaStream_t stream) {
  launch_units_of<__nv_bfloat16>(arguments, careful, multiprocessors, stream);
}

}  // namespace sparsek::cuda::sm90
