// The operator `backward`: checks, parameters, launch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>
#include <tuple>
#include <type_traits>

#include "common/checks.h"
#include "cuda/backward/params.h"
#include "cuda/common/device.h"
#include "cuda/common/kernels.h"
#include "cuda/common/tensor.h"
#include "cuda/plan/plan.h"
#include "cuda/sm80/backward/launch.h"
#include "cuda/sm90/backward/launch.h"

namespace sparsek::cuda {
namespace {

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

#ifdef SPARSEK_SM90
constexpr WidestHeads kWidest{kMaxBackwardWidthSm80, kMaxBackwardWidthSm90, 0};
#else
constexpr WidestHeads kWidest{kMaxBackwardWidthSm80, 0, 0};
#endif

template <typename T>
void run(Kernel kernel, const BackwardParams<T>& params, const Tensor& reference, const OnDeviceOf& device) {
  if constexpr (std::is_same_v<T, float>) {
    if (kernel != Kernel::kSimt) {
      const PlanMemory memory =
          make_plan(params, backward_run_size(params.sequences, params.heads_per_group), reference, device.stream());
#ifdef SPARSEK_SM90
      if (kernel == Kernel::kSm90)
        return run_backward_sm90(params, memory.plan, reference, device.multiprocessors(), device.stream());
#endif
      return run_backward_sm80(params, memory.plan, reference, device.stream());
    }
  }
  run_backward_simt(params, device.stream());
}

template <typename T>
Gradients launch_backward(const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& query,
                          const Tensor& key, const Tensor& value, const Tensor& scores, const Tensor& out,
                          const Tensor& lse, const Tensor& threshold, const Tensor& expiry, const AttentionShape& shape,
                          double scale, const Pattern& pattern, const SequenceLengths& lengths,
                          const std::optional<std::string>& name) {
  const OnDeviceOf device(query);
  const Kernel kernel = choose_kernel(name, device, kWidest, query, value);
  const Tensor table = transpose_scores<T>(scores);
  const Tensor dense_lse = torch::stable::contiguous(lse);
  const Tensor dense_grad_lse = grad_lse.has_value() ? torch::stable::contiguous(*grad_lse) : Tensor();
  // Packed queries and keys may lie outside of every sequence: their gradients stay 0.
  const auto make = lengths.packed() ? make_zeros : make_empty;
  const ScalarType dtype = query.scalar_type();
  // The tensor cores take gradients as they take values.
  const bool align = kernel != Kernel::kSimt;
  const Tensor q = align ? with_aligned_rows(query) : query, k = align ? with_aligned_rows(key) : key,
               v = align ? with_aligned_rows(value) : value;
  const Tensor dense_grad_out =
      align ? with_aligned_rows(grad_out.scalar_type() == dtype ? grad_out : torch::stable::to(grad_out, dtype))
            : grad_out;
  const Tensor grad_query = make(query, {shape.batch, shape.queries, shape.heads, query.size(3)}, dtype);
  const Tensor grad_key = make(query, {shape.batch, shape.keys, shape.groups, key.size(3)}, dtype);
  const Tensor grad_value = make(query, {shape.batch, shape.keys, shape.groups, value.size(3)}, dtype);
  const Tensor grad_scores = make(query, {shape.batch, shape.keys, shape.groups}, scores.scalar_type());
  const Tensor delta = make_empty(query, {shape.batch, shape.heads, shape.queries}, scalar_type<T>());
  const Tensor order = make_empty(query, {shape.batch, shape.groups, align ? 0 : shape.keys}, ScalarType::Int);
  // What no query sees has no gradient.
  const Tensor key_sums = make_zeros(query, {shape.batch, shape.groups, shape.keys}, ScalarType::Double);
  const Tensor query_sums = make(query, {shape.batch, shape.groups, shape.queries}, ScalarType::Double);

  BackwardParams<T> params;
  set_inputs(params, q, k, v, table, threshold, expiry, shape, scale, pattern, lengths.sequences);
  params.out = rows_of(out);
  params.grad_out = rows_of(dense_grad_out);
  params.lse = static_cast<const T*>(dense_lse.const_data_ptr());
  params.grad_lse = grad_lse.has_value() ? static_cast<const T*>(dense_grad_lse.const_data_ptr()) : nullptr;
  params.delta = static_cast<T*>(delta.mutable_data_ptr());
  params.order = static_cast<int32_t*>(order.mutable_data_ptr());
  params.grad_query = rows_of(grad_query);
  params.grad_key = rows_of(grad_key);
  params.grad_value = rows_of(grad_value);
  params.key_sums = static_cast<double*>(key_sums.mutable_data_ptr());
  params.query_sums = static_cast<double*>(query_sums.mutable_data_ptr());
  params.grad_scores = score_columns(grad_scores);
  run_delta(params, device.stream());
  run(kernel, params, query, device);
  run_score_gradient(params, query, device.stream());
  return {grad_query, grad_key, grad_value, grad_scores};
}

Gradients backward(const Tensor& grad_out, std::optional<Tensor> grad_lse, const Tensor& query, const Tensor& key,
                   const Tensor& value, const Tensor& scores, const Tensor& out, const Tensor& lse,
                   const Tensor& threshold, const Tensor& expiry, std::optional<Tensor> cu_seqlens_q,
                   std::optional<Tensor> cu_seqlens_k, int64_t window, bool causal, bool hard, double scale,
                   std::optional<std::string> kernel) {
  const Pattern pattern = make_pattern(window, causal, hard);
  const AttentionShape shape = check_attention(query, key, value, scores, threshold, expiry);
  const SequenceLengths lengths =
      make_sequences(cu_seqlens_q, cu_seqlens_k, query, shape.batch, shape.queries, shape.keys);
  check_gradients(grad_out, grad_lse, query, value, out, lse, shape);
  const auto launch = query.scalar_type() == ScalarType::Double ? launch_backward<double> : launch_backward<float>;
  return launch(grad_out, grad_lse, query, key, value, scores, out, lse, threshold, expiry, shape, scale, pattern,
                lengths, kernel);
}

}  // namespace
}  // namespace sparsek::cuda

STABLE_TORCH_LIBRARY_IMPL(xformers_sparsek, CUDA, m) { m.impl("backward", TORCH_BOX(&sparsek::cuda::backward)); }
