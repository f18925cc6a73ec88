#include "cuda/sm80/backward/key_pass.cuh"
#include "cuda/sm80/backward/query_pass.cuh"

namespace sparsek::cuda::sm80 {

template void launch_query_pass<__half, 128>(const BackwardParams<float>&, const Plan&, const Workspace&, cudaStream_t);
template void launch_key_pass<__half, 128>(const BackwardParams<float>&, const Plan&, const Workspace&, cudaStream_t);

}  // namespace sparsek::cuda::sm80
