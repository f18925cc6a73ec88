#include "cuda/sm90/short_forward/kernel.cuh"

namespace sparsek::cuda::sm90 {

template <>
void launch_short_forward_of<__nv_bfloat16>(const ShortForwardArguments& arguments, int width, int multiprocessors,
                                            cudaStream_t stream) {
  if (width == 64) return launch_short_forward<__nv_bfloat16, 64>(arguments, multiprocessors, stream);
  launch_short_forward<__nv_bfloat16, 128>(arguments, multiprocessors, stream);
}

}  // namespace sparsek::cuda::sm90
