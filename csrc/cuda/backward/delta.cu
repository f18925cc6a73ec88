// delta = rowsum(grad_out * out) - grad_lse, one warp per query and head.
#include <cstring>
#include <type_traits>

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

// The same for 16-bit rows that can be read by 16 bytes: kLanes threads per query and head.
template <typename Element, int kLanes>
__global__ void __launch_bounds__(32 * kWarps) find_delta_16(const __grid_constant__ BackwardParams<float> p) {
  const uint32_t heads = static_cast<uint32_t>(p.groups * p.heads_per_group),
                 queries = static_cast<uint32_t>(p.queries);
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * 32 * kWarps + threadIdx.x) / kLanes;
  const bool exists = index < p.batch * p.queries * heads;
  const uint32_t row = exists ? static_cast<uint32_t>(index) : 0;
  const uint32_t head = row % heads, query = row / heads % queries, batch = row / heads / queries;
  const int chunk = threadIdx.x % kLanes;
  float sum = 0.0f;
  if (chunk * 8 < p.value.width) {
    const uint4 out = __ldg(reinterpret_cast<const uint4*>(p.out.row(batch, query, head)) + chunk);
    const uint4 grad = __ldg(reinterpret_cast<const uint4*>(p.grad_out.row(batch, query, head)) + chunk);
    Element x[8], y[8];
    memcpy(x, &out, sizeof(x));
    memcpy(y, &grad, sizeof(y));
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = fmaf(static_cast<float>(x[i]), static_cast<float>(y[i]), sum);
  }
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  if (!exists || chunk != 0) return;
  const int64_t flat = (static_cast<int64_t>(batch) * heads + head) * queries + query;
  p.delta[flat] = p.grad_lse == nullptr ? sum : sum - p.grad_lse[flat];
}

bool has_wide_rows(const Rows& rows) {
  if (rows.element_size != 2 || rows.stride[3] != 1 || rows.width % 8 != 0 || rows.width > 256) return false;
  if (reinterpret_cast<uintptr_t>(rows.data) % 16 != 0) return false;
  return rows.stride[0] % 8 == 0 && rows.stride[1] % 8 == 0 && rows.stride[2] % 8 == 0;
}

template <typename Element>
void launch_delta_16(const BackwardParams<float>& params, int64_t rows, cudaStream_t stream) {
  const int64_t width = params.value.width;
  const int lanes = width <= 64 ? 8 : width <= 128 ? 16 : 32;
  const auto kernel = lanes == 8    ? find_delta_16<Element, 8>
                      : lanes == 16 ? find_delta_16<Element, 16>
                                    : find_delta_16<Element, 32>;
  constexpr int kThreads = 32 * kWarps;
  launch("find_delta_16", kernel, (rows * lanes + kThreads - 1) / kThreads, kThreads, 0, stream, params);
}

}  // namespace

template <typename T>
void run_delta(const BackwardParams<T>& params, cudaStream_t stream) {
  const int64_t rows = params.batch * params.queries * params.groups * params.heads_per_group;
  if constexpr (std::is_same_v<T, float>) {
    if (params.out.dtype == params.grad_out.dtype && has_wide_rows(params.out) && has_wide_rows(params.grad_out)) {
      const bool bf16 = params.out.dtype == torch::headeronly::ScalarType::BFloat16;
      return bf16 ? launch_delta_16<__nv_bfloat16>(params, rows, stream)
                  : launch_delta_16<__half>(params, rows, stream);
    }
  }
  launch("find_delta", find_delta<T>, (rows + kWarps - 1) / kWarps, 32 * kWarps, 0, stream, params);
}

template void run_delta(const BackwardParams<float>&, cudaStream_t);
template void run_delta(const BackwardParams<double>&, cudaStream_t);

}  // namespace sparsek::cuda
