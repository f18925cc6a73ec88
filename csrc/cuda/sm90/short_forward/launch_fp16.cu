#include "cuda/sm90/short_forward/kernel.cuh"

namespace sparsek::cuda::sm90 {

template <>
void launch_short_forward_of<__half>(const ShortForwardArguments& arguments, int width, int multiprocessors,
                                     cudaStream_t stream) {
  if (width == 64) return launch_short_forward<__half, 64>(arguments, multiprocessors, stream);
  launch_short_forward<__half, 128>(arguments, multiprocessors, stream);
}

}  // namespace sparsek::cuda::sm90
