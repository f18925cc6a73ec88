#include "cpu/common/checks.h"

#include <algorithm>

namespace sparsek::cpu {

Pattern make_pattern(int64_t window, bool causal, bool hard) {
  STD_TORCH_CHECK(window >= 0 && (causal || window == 0), "window must not be negative, and 0 unless causal, got ",
                  window);
  return {std::min<int64_t>(window, kNever), causal, hard};
}

AttentionShape check_attention(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& scores,
                               const Tensor& threshold, const Tensor& expiry) {
  check_tensor("query", query, {-1, -1, -1, -1});
  const int64_t batch = query.size(0), queries = query.size(1), heads = query.size(2);
  check_tensor("key", key, {batch, -1, -1, query.size(3)});
  const int64_t keys = key.size(1), groups = key.size(2);
  check_tensor("value", value, {batch, keys, groups, -1});
  check_tensor("scores", scores, {batch, keys, groups});
  check_tensor("threshold", threshold, {batch, groups, queries});
  check_tensor("expiry", expiry, {batch, groups, keys});
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

}  // namespace sparsek::cpu
