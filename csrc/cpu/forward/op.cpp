// The operator `forward`: checks, parameters, launch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <limits>
#include <string>
#include <tuple>

#include "common/checks.h"
#include "cpu/forward/params.h"

namespace sparsek::cpu {
namespace {

template <typename T>
void launch_forward(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& scores,
                    const Tensor& threshold, const Tensor& expiry, const AttentionShape& shape, double scale,
                    const Pattern& pattern, std::vector<Sequence> sequences, const Tensor& out, const Tensor& lse) {
  const Tensor table = transpose_scores<T>(scores);
  ForwardParams<T> params;
  set_inputs(params, query, key, value, table, threshold, expiry, shape, scale, pattern, std::move(sequences));
  params.out = rows_of(out);
  params.lse = static_cast<T*>(lse.mutable_data_ptr());
  run_forward(params);
}

std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& scores,
                                   const Tensor& threshold, const Tensor& expiry, std::optional<Tensor> cu_seqlens_q,
                                   std::optional<Tensor> cu_seqlens_k, int64_t window, bool causal, bool hard,
                                   double scale, std::optional<ScalarType> out_dtype, std::optional<std::string> kernel,
                                   std::optional<std::string> backward_kernel) {
  STD_TORCH_CHECK(!kernel.has_value() && !backward_kernel.has_value(),
                  "the CPU has one kernel, got kernel=", kernel.value_or("None"),
                  " and backward_kernel=", backward_kernel.value_or("None"));
  const Pattern pattern = make_pattern(window, causal, hard);
  const AttentionShape shape = check_attention(query, key, value, scores, threshold, expiry);
  auto sequences = list_sequences(cu_seqlens_q, cu_seqlens_k, shape.batch, shape.queries, shape.keys);
  const ScalarType dtype = out_dtype.value_or(query.scalar_type());
  STD_TORCH_CHECK(is_supported(dtype), "out_dtype must be float64, float32, bfloat16 or float16");
  const bool wide = query.scalar_type() == ScalarType::Double;
  // Queries before the first key are in no tile: they keep output 0 and LSE -inf.
  Tensor out = make_zeros(query, {shape.batch, shape.queries, shape.heads, value.size(3)}, dtype);
  Tensor lse =
      make_empty(query, {shape.batch, shape.heads, shape.queries}, wide ? ScalarType::Double : ScalarType::Float);
  torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
  const auto launch = wide ? launch_forward<double> : launch_forward<float>;
  launch(query, key, value, scores, threshold, expiry, shape, scale, pattern, std::move(sequences), out, lse);
  return {out, lse};
}

}  // namespace
}  // namespace sparsek::cpu

STABLE_TORCH_LIBRARY_IMPL(xformers_sparsek, CPU, m) { m.impl("forward", TORCH_BOX(&sparsek::cpu::forward)); }
