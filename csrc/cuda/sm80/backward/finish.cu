#include <limits>

#include "cuda/common/launch.cuh"
#include "cuda/sm80/backward/launch.h"
#include "cuda/sm80/mma.cuh"

namespace sparsek::cuda::sm80 {
namespace {

constexpr int kFinishThreads = 256;

// Whether the scores of a key's sequence hold NaN: its last threshold does then.
__device__ bool has_nan_scores(const BackwardParams<float>& p, int64_t batch, int64_t group, int64_t key) {
  const Sequences& sequences = p.sequences;
  const Sequence sequence = sequences.at(sequences.find(sequences.cu_k, p.keys, {1, 0}, batch * p.keys + key));
  if (key < sequence.key_begin || key >= sequence.key_begin + sequence.keys || sequence.queries == 0) return false;
  const float threshold =
      p.threshold[(batch * p.groups + group) * p.queries + sequence.query_begin + sequence.queries - 1];
  return threshold != threshold;
}

// Rounds sums [B, G, Mk, width] into gradients [B, Mk, G, width]: eight elements per thread.
__global__ void __launch_bounds__(kFinishThreads)
    round_sums(const __grid_constant__ BackwardParams<float> p, const float* sums, const __grid_constant__ Rows rows,
               float scale) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kFinishThreads + threadIdx.x;
  const int64_t chunks = rows.width / 8, row = index / chunks, chunk = index % chunks;
  if (row >= p.batch * p.groups * p.keys) return;
  const int64_t key = row % p.keys, group = row / p.keys % p.groups, batch = row / p.keys / p.groups;
  if (has_nan_scores(p, batch, group, key)) {
    scale = std::numeric_limits<float>::quiet_NaN();
    if (chunk == 0) p.key_sums[row] = scale;
  }
  const float4* source = reinterpret_cast<const float4*>(sums + row * rows.width) + 2 * chunk;
  const float4 low = __ldcs(source), high = __ldcs(source + 1);
  const auto round = [&](auto pack_two) {
    return uint4{pack_two(scale * low.x, scale * low.y), pack_two(scale * low.z, scale * low.w),
                 pack_two(scale * high.x, scale * high.y), pack_two(scale * high.z, scale * high.w)};
  };
  reinterpret_cast<uint4*>(rows.row(batch, key, group))[chunk] =
      rows.dtype == ScalarType::BFloat16 ? round([](float x, float y) { return pack<__nv_bfloat16>(x, y); })
                                         : round([](float x, float y) { return pack<__half>(x, y); });
}

// The heads of a group share their gates.
__global__ void __launch_bounds__(kFinishThreads)
    sum_heads(const __grid_constant__ BackwardParams<float> p, const float* gate_sums) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kFinishThreads + threadIdx.x;
  if (index >= p.batch * p.groups * p.queries) return;
  const int64_t kv_head = index / p.queries, query = index % p.queries;
  double sum = 0.0;
  for (int64_t h = 0; h < p.heads_per_group; ++h)
    sum += gate_sums[(kv_head * p.heads_per_group + h) * p.queries + query];
  p.query_sums[index] = sum;
}

}  // namespace

void launch_finish(const BackwardParams<float>& params, const Workspace& work, cudaStream_t stream) {
  const auto ctas = [](int64_t threads) { return (threads + kFinishThreads - 1) / kFinishThreads; };
  const int64_t rows = params.batch * params.groups * params.keys;
  launch("round_sums", round_sums, ctas(rows * (params.grad_key.width / 8)), kFinishThreads, 0, stream, params,
         work.grad_key, params.grad_key, static_cast<float>(params.scale));
  launch("round_sums", round_sums, ctas(rows * (params.grad_value.width / 8)), kFinishThreads, 0, stream, params,
         work.grad_value, params.grad_value, 1.0f);
  launch("sum_heads", sum_heads, ctas(params.batch * params.groups * params.queries), kFinishThreads, 0, stream, params,
         work.gate_sums);
}

}  // namespace sparsek::cuda::sm80
