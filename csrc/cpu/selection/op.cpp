// The operator `select`: scores to thresholds and expiries.
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <cmath>
#include <tuple>

#include "common/checks.h"
#include "cpu/common/sequences.h"
#include "cpu/common/tasks.h"
#include "cpu/common/tensor.h"
#include "cpu/selection/thresholds.h"

namespace sparsek::cpu {
namespace {

template <typename T>
void run_select(const Tensor& scores, const std::vector<Sequence>& sequences, const Pattern& pattern, int64_t num_keys,
                Tensor& threshold, Tensor& expiry) {
  const int64_t keys = scores.size(1), groups = scores.size(2), queries = threshold.size(2);
  const Rows columns = score_columns(scores);
  T* threshold_data = static_cast<T*>(threshold.mutable_data_ptr());
  int32_t* expiry_data = static_cast<int32_t*>(expiry.mutable_data_ptr());
  std::atomic<bool> has_nan{false};
  run_tasks(static_cast<int64_t>(sequences.size()) * groups, [&] {
    return [&, rows = columns, column = std::vector<double>()](int64_t task) mutable {
      const Sequence& sequence = sequences[task / groups];
      const int64_t group = task % groups;
      column.resize(sequence.keys);
      rows.width = sequence.keys;
      load_row(rows, rows.row(sequence.batch, sequence.key_begin, group), 1.0, column.data());
      for (double score : column)
        if (std::isnan(score)) has_nan = true;
      if (has_nan) return;
      const int64_t head = sequence.batch * groups + group;
      find_thresholds(ThresholdParams{pattern, num_keys, sequence.keys, sequence.queries}, column.data(),
                      threshold_data + head * queries + sequence.query_begin,
                      expiry_data + head * keys + sequence.key_begin);
    };
  });
  STD_TORCH_CHECK(!has_nan, "scores contain NaN, shape ", shape_of(scores));
}

std::tuple<Tensor, Tensor> select(const Tensor& scores, std::optional<Tensor> cu_seqlens_q,
                                  std::optional<Tensor> cu_seqlens_k, int64_t num_queries, int64_t num_keys,
                                  int64_t window, bool causal, bool hard) {
  const auto [batch, keys, groups, wide] = check_select(scores, num_queries, num_keys);
  const auto sequences = list_sequences(cu_seqlens_q, cu_seqlens_k, batch, num_queries, keys);
  Tensor threshold = make_empty(scores, {batch, groups, num_queries}, wide ? ScalarType::Double : ScalarType::Float);
  Tensor expiry = make_empty(scores, {batch, groups, keys}, ScalarType::Int);
  const Pattern pattern = make_pattern(window, causal, hard);
  if (wide) {
    run_select<double>(scores, sequences, pattern, num_keys, threshold, expiry);
  } else {
    run_select<float>(scores, sequences, pattern, num_keys, threshold, expiry);
  }
  return {threshold, expiry};
}

}  // namespace
}  // namespace sparsek::cpu

STABLE_TORCH_LIBRARY_IMPL(xformers_sparsek, CPU, m) { m.impl("select", TORCH_BOX(&sparsek::cpu::select)); }
