// The operator `select`: scores to thresholds and expiries.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "common/checks.h"
#include "cuda/common/device.h"
#include "cuda/common/tensor.h"
#include "cuda/selection/params.h"

namespace sparsek::cuda {
namespace {

// The thresholds, or k-th highest levels, after every key, as bytes.
template <typename T, bool kHard>
Tensor find_levels(const Tensor& scores, const OutputParams<T>& outputs, int64_t num_keys, cudaStream_t stream) {
  using Level = Level<T, kHard>;
  const int64_t levels = outputs.batch * outputs.groups * outputs.sequences.keys;
  const int64_t starts = chunk_starts(outputs.sequences, kChunk<T, kHard>) * outputs.groups;
  const auto allocate = [&](int64_t count, int64_t size) {
    return make_empty(scores, {count * size}, ScalarType::Byte);
  };
  Tensor after_key = allocate(levels, sizeof(Level));
  Tensor survivors = allocate(starts, kMaxSurvivors<T, kHard> * sizeof(Level));
  Tensor lower = allocate(starts, sizeof(Level));
  Tensor survivor_count = allocate(starts, sizeof(int32_t));
  LevelParams<T, kHard> params;
  params.table = outputs.table;
  params.sequences = outputs.sequences;
  params.groups = outputs.groups;
  params.pattern = outputs.pattern;
  params.num_keys = num_keys;
  params.survivors = static_cast<Level*>(survivors.mutable_data_ptr());
  params.lower = static_cast<Level*>(lower.mutable_data_ptr());
  params.survivor_count = static_cast<int32_t*>(survivor_count.mutable_data_ptr());
  params.after_key = static_cast<Level*>(after_key.mutable_data_ptr());
  launch_levels<T, kHard>(params, stream);
  return after_key;
}

template <typename T>
void run_select(const Tensor& scores, const Sequences& sequences, const Pattern& pattern, int64_t num_keys,
                Tensor& threshold, Tensor& expiry, cudaStream_t stream) {
  const int64_t batch = scores.size(0), keys = scores.size(1), groups = scores.size(2);
  T* threshold_data = static_cast<T*>(threshold.mutable_data_ptr());
  int32_t* expiry_data = static_cast<int32_t*>(expiry.mutable_data_ptr());
  if (!pattern.causal && sequences.cu_k == nullptr) {
    const SequenceParams<T> params{score_columns(scores), batch,          groups,     sequences.queries, keys, num_keys,
                                   pattern.hard,          threshold_data, expiry_data};
    if (launch_sequences<T>(params, stream)) return;
  }
  Tensor table = make_empty(scores, {batch, groups, keys}, scalar_type<T>());
  Tensor has_nan = make_zeros(scores, {sequences.count, groups}, ScalarType::Int);
  T* table_data = static_cast<T*>(table.mutable_data_ptr());
  int32_t* has_nan_data = static_cast<int32_t*>(has_nan.mutable_data_ptr());
  launch_table<T>({score_columns(scores), sequences, batch, groups, table_data, has_nan_data}, stream);

  OutputParams<T> outputs{};
  outputs.table = table_data;
  outputs.sequences = sequences;
  outputs.batch = batch;
  outputs.groups = groups;
  outputs.pattern = pattern;
  outputs.has_nan = has_nan_data;
  outputs.threshold = threshold_data;
  outputs.expiry = expiry_data;
  const Tensor soft = find_levels<T, false>(scores, outputs, num_keys, stream);
  outputs.soft = static_cast<const T*>(soft.const_data_ptr());
  std::optional<Tensor> hard;
  if (pattern.hard) {
    hard = find_levels<T, true>(scores, outputs, num_keys, stream);
    outputs.hard = static_cast<const Level<T, true>*>(hard->const_data_ptr());
  }
  launch_outputs<T>(outputs, stream);
}

std::tuple<Tensor, Tensor> select(const Tensor& scores, std::optional<Tensor> cu_seqlens_q,
                                  std::optional<Tensor> cu_seqlens_k, int64_t num_queries, int64_t num_keys,
                                  int64_t window, bool causal, bool hard) {
  const auto [batch, keys, groups, wide] = check_select(scores, num_queries, num_keys);
  const Pattern pattern = make_pattern(window, causal, hard);
  const SequenceLengths lengths = make_sequences(cu_seqlens_q, cu_seqlens_k, scores, batch, num_queries, keys);
  const Sequences& sequences = lengths.sequences;
  const OnDeviceOf device(scores);
  Tensor threshold = make_empty(scores, {batch, groups, num_queries}, wide ? ScalarType::Double : ScalarType::Float);
  Tensor expiry = make_empty(scores, {batch, groups, keys}, ScalarType::Int);
  // Without sequences there are no rows, if the lengths are right.
  if (groups == 0 || sequences.count == 0) return {threshold, expiry};
  if (wide) {
    run_select<double>(scores, sequences, pattern, num_keys, threshold, expiry, device.stream());
  } else {
    run_select<float>(scores, sequences, pattern, num_keys, threshold, expiry, device.stream());
  }
  return {threshold, expiry};
}

}  // namespace
}  // namespace sparsek::cuda

STABLE_TORCH_LIBRARY_IMPL(xformers_sparsek, CUDA, m) { m.impl("select", TORCH_BOX(&sparsek::cuda::select)); }
