#include "cuda/sm80/decode/kernel.cuh"

namespace sparsek::cuda::sm80 {

template <>
void launch_decode_of<__nv_bfloat16>(const DecodeArguments& arguments, int width, cudaStream_t stream) {
  if (width == 64) return launch_decode<__nv_bfloat16, 64>(arguments, stream);
  launch_decode<__nv_bfloat16, 128>(arguments, stream);
}

}  // namespace sparsek::cuda::sm80
