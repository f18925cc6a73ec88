#include "cuda/sm80/backward/launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "cuda/common/device.h"

namespace sparsek::cuda {
namespace sm80 {
namespace {

template <typename T, int W>
void run_passes(const BackwardParams<float>& params, const Plan& plan, const Workspace& work, cudaStream_t stream) {
  launch_query_pass<T, W>(params, plan, work, stream);
  launch_key_pass<T, W>(params, plan, work, stream);
}

template <typename T>
void run_passes(const BackwardParams<float>& params, const Plan& plan, const Workspace& work, cudaStream_t stream) {
  const int64_t width = std::max(params.query.width, params.value.width);
  const auto run = width <= 64 ? run_passes<T, 64> : width <= 128 ? run_passes<T, 128> : run_passes<T, 256>;
  run(params, plan, work, stream);
}

}  // namespace

int choose_stages(int64_t single_bytes, int64_t double_bytes) {
  constexpr int64_t kReserved = 1024;  // of each CTA's shared memory
  int device = 0, per_cta = 0, per_multiprocessor = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&per_cta, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
             "cudaDeviceGetAttribute");
  check_cuda(cudaDeviceGetAttribute(&per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
             "cudaDeviceGetAttribute");
  const auto ctas = [&](int64_t bytes) { return bytes > per_cta ? 0 : per_multiprocessor / (bytes + kReserved); };
  // The registers leave room for no more than two or three CTAs.
  return std::min<int64_t>(ctas(double_bytes), 2) >= std::min<int64_t>(ctas(single_bytes), 2) ? 2 : 1;
}

}  // namespace sm80

void run_backward_sm80(const BackwardParams<float>& params, const Plan& plan, const Tensor& reference,
                       cudaStream_t stream) {
  const Sequences& sequences = params.sequences;
  if (sequences.count == 0) return;
  const int64_t heads = params.groups * params.heads_per_group;
  const int64_t width = std::max(params.query.width, params.value.width);
  const int64_t runs = sequences.num_items(sequences.cu_k, params.keys, plan.runs);
  constexpr int64_t kMostItems = 64;

  // What no query sees and what lies outside of every sequence stays 0.
  const bool zeroed = params.pattern.window == 0 || sequences.cu_k != nullptr;
  const auto make_sums = zeroed ? make_zeros : make_empty;
  const Tensor grad_key =
      make_sums(reference, {params.batch, params.groups, params.keys, params.query.width}, ScalarType::Float);
  const Tensor grad_value =
      make_sums(reference, {params.batch, params.groups, params.keys, params.value.width}, ScalarType::Float);
  const auto make_rows = sequences.cu_q != nullptr ? make_zeros : make_empty;
  const Tensor gate_sums = make_rows(reference, {params.batch, heads, params.queries}, ScalarType::Float);
  const Tensor added = make_zeros(reference, {1 + runs * params.groups}, ScalarType::Int);

  sm80::Workspace work;
  work.gate_sums = static_cast<float*>(gate_sums.mutable_data_ptr());
  work.grad_key = static_cast<float*>(grad_key.mutable_data_ptr());
  work.grad_value = static_cast<float*>(grad_value.mutable_data_ptr());
  work.ticket = static_cast<int32_t*>(added.mutable_data_ptr());
  work.added = work.ticket + 1;
  // About one block of keys per item, were the runs of equal length; longer lists go around.
  const int64_t blocks = params.batch * params.keys / std::max<int64_t>(1, runs * sm80::keys_per_item(width)) + 1;
  work.items_per_run = std::clamp<int64_t>(blocks, 1, kMostItems);

  if (params.query.dtype == ScalarType::BFloat16) {
    sm80::run_passes<__nv_bfloat16>(params, plan, work, stream);
  } else {
    sm80::run_passes<__half>(params, plan, work, stream);
  }
  sm80::launch_finish(params, work, stream);
}

}  // namespace sparsek::cuda
