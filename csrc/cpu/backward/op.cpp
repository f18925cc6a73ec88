// The operator `backward`: checks, parameters, launch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>
#include <tuple>
#include <utility>

#include "common/checks.h"
#include "cpu/backward/params.h"

namespace sparsek::cpu {
namespace {

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <typename T>
Gradients launch_backward(const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& query,
                          const Tensor& key, const Tensor& value, const Tensor& scores, const Tensor& out,
                          const Tensor& lse, const Tensor& threshold, const Tensor& expiry, const AttentionShape& shape,
                          double scale, const Pattern& pattern, std::vector<Sequence> sequences) {
  const ScalarType sum_dtype = scalar_type<T>();
  const int64_t width = query.size(3), value_width = value.size(3);
  const Tensor table = transpose_scores<T>(scores);
  const Tensor dense_lse = torch::stable::contiguous(lse);
  const Tensor dense_grad_lse = grad_lse.has_value() ? torch::stable::contiguous(*grad_lse) : Tensor();
  // Queries before the first key are in no tile: their gradient stays 0.
  const Tensor grad_query = make_zeros(query, {shape.batch, shape.queries, shape.heads, width}, query.scalar_type());
  const Tensor grad_key = make_zeros(query, {shape.batch, shape.keys, shape.groups, width}, sum_dtype);
  const Tensor grad_value = make_zeros(query, {shape.batch, shape.keys, shape.groups, value_width}, sum_dtype);
  const Tensor grad_scores = make_empty(query, {shape.batch, shape.keys, shape.groups}, scores.scalar_type());
  const Tensor key_sums = make_zeros(query, {shape.batch, shape.groups, shape.keys}, ScalarType::Double);
  const Tensor query_sums = make_zeros(query, {shape.batch, shape.groups, shape.queries}, ScalarType::Double);

  BackwardParams<T> params;
  set_inputs(params, query, key, value, table, threshold, expiry, shape, scale, pattern, std::move(sequences));
  params.out = rows_of(out);
  params.lse = static_cast<const T*>(dense_lse.const_data_ptr());
  params.grad_out = rows_of(grad_out);
  params.grad_lse = grad_lse.has_value() ? static_cast<const T*>(dense_grad_lse.const_data_ptr()) : nullptr;
  params.grad_query = rows_of(grad_query);
  params.grad_key = static_cast<T*>(grad_key.mutable_data_ptr());
  params.grad_value = static_cast<T*>(grad_value.mutable_data_ptr());
  params.key_sums = static_cast<double*>(key_sums.mutable_data_ptr());
  params.query_sums = static_cast<double*>(query_sums.mutable_data_ptr());
  params.grad_scores = score_columns(grad_scores);
  run_backward(params);
  run_score_gradient(params);
  const ScalarType dtype = query.scalar_type();
  return {grad_query, torch::stable::to(grad_key, dtype), torch::stable::to(grad_value, dtype), grad_scores};
}

Gradients backward(const Tensor& grad_out, std::optional<Tensor> grad_lse, const Tensor& query, const Tensor& key,
                   const Tensor& value, const Tensor& scores, const Tensor& out, const Tensor& lse,
                   const Tensor& threshold, const Tensor& expiry, std::optional<Tensor> cu_seqlens_q,
                   std::optional<Tensor> cu_seqlens_k, int64_t window, bool causal, bool hard, double scale,
                   std::optional<std::string> kernel) {
  const Pattern pattern = make_pattern(window, causal, hard);
  const AttentionShape shape = check_attention(query, key, value, scores, threshold, expiry);
  auto sequences = list_sequences(cu_seqlens_q, cu_seqlens_k, shape.batch, shape.queries, shape.keys);
  check_gradients(grad_out, grad_lse, query, value, out, lse, shape);
  STD_TORCH_CHECK(!kernel.has_value(), "the CPU has one kernel, got kernel=", *kernel);
  const bool wide = query.scalar_type() == ScalarType::Double;
  const auto launch = wide ? launch_backward<double> : launch_backward<float>;
  return launch(grad_out, grad_lse, query, key, value, scores, out, lse, threshold, expiry, shape, scale, pattern,
                std::move(sequences));
}

}  // namespace
}  // namespace sparsek::cpu

STABLE_TORCH_LIBRARY_IMPL(xformers_sparsek, CPU, m) { m.impl("backward", TORCH_BOX(&sparsek::cpu::backward)); }
