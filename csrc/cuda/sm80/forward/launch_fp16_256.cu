#include "cuda/sm80/forward/kernel.cuh"

namespace sparsek::cuda::sm80 {
template void launch_forward<__half, 256>(const ForwardParams<float>&, const Plan&, cudaStream_t);
}
