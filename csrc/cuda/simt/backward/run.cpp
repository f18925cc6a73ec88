#include "cuda/simt/backward/passes.h"

namespace sparsek::cuda {

template <typename T>
void run_backward_simt(const BackwardParams<T>& params, cudaStream_t stream) {
  simt::run_query_pass(params, stream);
  simt::run_order(params, stream);
  simt::run_key_pass(params, stream);
}

template void run_backward_simt(const BackwardParams<float>&, cudaStream_t);
template void run_backward_simt(const BackwardParams<double>&, cudaStream_t);

}  // namespace sparsek::cuda
