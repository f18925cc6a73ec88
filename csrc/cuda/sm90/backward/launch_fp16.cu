#include "cuda/sm90/backward/kernel.cuh"

namespace sparsek::cuda::sm90 {

template <>
void launch_backward_of<__half>(const BackwardArguments& arguments, bool careful, int multiprocessors,
                                cudaStream_t stream) {
  launch_units_of<__half>(arguments, careful, multiprocessors, stream);
}

}  // namespace sparsek::cuda::sm90
