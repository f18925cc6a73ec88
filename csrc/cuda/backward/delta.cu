// delta = rowsum(grad_out * out) - grad_lse, one warp per query and head.
#include "cuda/backward/params.h"
#include "cuda/common/elements.cuh"
#include "cuda/common/launch.cuh"

namespace sparsek::cuda {
namespace {

constexpr int kWarps = 8;

template <typename T>
__global__ void __launch_bounds__(32 * kWarps) find_delta(const __grid_constant__ BackwardParams<T> p) {
  const int64_t heads = p.groups * p.heads_per_group;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;  // in [B, Mq, H], as rows lie
  if (index >= p.batch * p.queries * heads) return;
  const int64_t head = index % heads, query = index / heads % p.queries, batch = index / heads / p.queries;
  const char* out = p.out.row(batch, query, head);
  const char* grad_out = p.grad_out.row(batch, query, head);
  T sum = 0;
  with_stored(p.out.dtype, [&](auto out_type) {
    with_stored(p.grad_out.dtype, [&](auto grad_type) {
#pragma unroll 4
      for (int64_t d = threadIdx.x % 32; d < p.value.width; d += 32)
        sum = fma(read<T, typename decltype(out_type)::type>(out, d * p.out.stride[3]),
                  read<T, typename decltype(grad_type)::type>(grad_out, d * p.grad_out.stride[3]), sum);
    });
  });
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  if (threadIdx.x % 32 != 0) return;
  const int64_t flat = (batch * heads + head) * p.queries + query;
  p.delta[flat] = p.grad_lse == nullptr ? sum : sum - p.grad_lse[flat];
}

}  // namespace

template <typename T>
void run_delta(const BackwardParams<T>& params, cudaStream_t stream) {
  const int64_t rows = params.batch * params.queries * params.groups * params.heads_per_group;
  launch("find_delta", find_delta<T>, (rows + kWarps - 1) / kWarps, 32 * kWarps, 0, stream, params);
}

template void run_delta(const BackwardParams<float>&, cudaStream_t);
template void run_delta(const BackwardParams<double>&, cudaStream_t);

}  // namespace sparsek::cuda
