#include "common/checks.h"

#include <algorithm>
#include <utility>

namespace sparsek {

Pattern make_pattern(int64_t window, bool causal, bool hard) {
  STD_TORCH_CHECK(window >= 0 && (causal || window == 0), "window must not be negative, and 0 unless causal, got ",
                  window);
  return {std::min<int64_t>(window, kNever), causal, hard};
}

SelectShape check_select(const Tensor& scores, int64_t num_queries, int64_t num_keys) {
  check_sizes("scores", scores, {-1, -1, -1});
  STD_TORCH_CHECK(is_supported(scores.scalar_type()), "scores must be float64, float32, bfloat16 or float16");
  STD_TORCH_CHECK(num_queries >= 0 && num_keys >= 1, "select needs num_queries >= 0 and num_keys >= 1, got ",
                  num_queries, " and ", num_keys);
  STD_TORCH_CHECK(std::max(scores.size(1), num_queries) < kNever, "sequences must be shorter than 2^31 - 1");
  return {scores.size(0), scores.size(1), scores.size(2), scores.scalar_type() == ScalarType::Double};
}

AttentionShape check_attention(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& scores,
                               const Tensor& threshold, const Tensor& expiry) {
  check_sizes("query", query, {-1, -1, -1, -1});
  const int64_t batch = query.size(0), queries = query.size(1), heads = query.size(2);
  check_sizes("key", key, {batch, -1, -1, query.size(3)});
  const int64_t keys = key.size(1), groups = key.size(2);
  check_sizes("value", value, {batch, keys, groups, -1});
  check_sizes("scores", scores, {batch, keys, groups});
  check_sizes("threshold", threshold, {batch, groups, queries});
  check_sizes("expiry", expiry, {batch, groups, keys});
  for (const auto& [name, tensor] : {std::pair{"key", &key}, std::pair{"value", &value}, std::pair{"scores", &scores},
                                     std::pair{"threshold", &threshold}, std::pair{"expiry", &expiry}})
    check_device(name, *tensor, query);
  STD_TORCH_CHECK(groups > 0 && heads > 0 && heads % groups == 0, "query has ", heads, " heads, not a multiple of the ",
                  groups, " heads of key");
  STD_TORCH_CHECK(query.size(3) > 0 && value.size(3) > 0, "query and value need a width of at least one");
  STD_TORCH_CHECK(std::max(keys, queries) < kNever, "sequences must be shorter than 2^31 - 1");
  const ScalarType dtype = query.scalar_type();
  STD_TORCH_CHECK(is_supported(dtype) && key.scalar_type() == dtype && value.scalar_type() == dtype,
                  "query, key and value must all be float64, float32, bfloat16 or float16");
  const bool wide = dtype == ScalarType::Double;
  STD_TORCH_CHECK(is_supported(scores.scalar_type()) && (scores.scalar_type() == ScalarType::Double) == wide,
                  "scores must be float64 exactly if query is");
  STD_TORCH_CHECK(threshold.scalar_type() == (wide ? ScalarType::Double : ScalarType::Float) &&
                      expiry.scalar_type() == ScalarType::Int && threshold.is_contiguous() && expiry.is_contiguous(),
                  "threshold and expiry must be what select returns");
  return {batch, queries, keys, heads, groups};
}

void check_gradients(const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& query,
                     const Tensor& value, const Tensor& out, const Tensor& lse, const AttentionShape& shape) {
  for (const auto& [name, tensor] : {std::pair{"grad_out", &grad_out}, std::pair{"out", &out}}) {
    check_device(name, *tensor, query);
    check_sizes(name, *tensor, {shape.batch, shape.queries, shape.heads, value.size(3)});
    STD_TORCH_CHECK(is_supported(tensor->scalar_type()), name, " must be float64, float32, bfloat16 or float16");
  }
  const bool wide = query.scalar_type() == ScalarType::Double;
  for (const auto& [name, tensor] :
       {std::pair{"lse", &lse}, std::pair{"grad_lse", grad_lse.has_value() ? &*grad_lse : &lse}}) {
    check_device(name, *tensor, query);
    check_sizes(name, *tensor, {shape.batch, shape.heads, shape.queries});
    STD_TORCH_CHECK(tensor->scalar_type() == (wide ? ScalarType::Double : ScalarType::Float), name,
                    " must be float64 if query is, and float32 otherwise");
  }
}

}  // namespace sparsek
