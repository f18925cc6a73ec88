// The operator `select`: scores to thresholds and expiries.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "common/checks.h"
#include "cuda/common/device.h"
#include "cuda/selection/params.h"

namespace sparsek::cuda {
namespace {

// Contiguous lengths of the right form. What they contain only the device knows.
Tensor checked_lengths(const char* name, const Tensor& lengths, const Tensor& scores) {
  STD_TORCH_CHECK(lengths.scalar_type() == ScalarType::Int && lengths.dim() == 1 && lengths.size(0) >= 1, name,
                  " must be an int32 tensor [sequences + 1], got shape ", shape_of(lengths));
  check_device(name, lengths, scores);
  return torch::stable::contiguous(lengths);
}

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
  outputs.threshold = static_cast<T*>(threshold.mutable_data_ptr());
  outputs.expiry = static_cast<int32_t*>(expiry.mutable_data_ptr());
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
  check_sizes("scores", scores, {-1, -1, -1});
  STD_TORCH_CHECK(is_supported(scores.scalar_type()), "scores must be float64, float32, bfloat16 or float16");
  STD_TORCH_CHECK(num_queries >= 0 && num_keys >= 1, "select needs num_queries >= 0 and num_keys >= 1, got ",
                  num_queries, " and ", num_keys);
  const int64_t batch = scores.size(0), keys = scores.size(1), groups = scores.size(2);
  STD_TORCH_CHECK(std::max(keys, num_queries) < kNever, "sequences must be shorter than 2^31 - 1");
  STD_TORCH_CHECK(cu_seqlens_q.has_value() == cu_seqlens_k.has_value(),
                  "cu_seqlens must be given for queries and keys, or for neither");
  const Pattern pattern = make_pattern(window, causal, hard);
  Sequences sequences{nullptr, nullptr, batch, num_queries, keys};
  std::optional<Tensor> lengths_q, lengths_k;
  if (cu_seqlens_q.has_value()) {
    STD_TORCH_CHECK(batch == 1, "packed sequences need batch size 1, got ", batch);
    lengths_q = checked_lengths("cu_seqlens_q", *cu_seqlens_q, scores);
    lengths_k = checked_lengths("cu_seqlens_k", *cu_seqlens_k, scores);
    sequences.count = lengths_q->size(0) - 1;
    STD_TORCH_CHECK(lengths_k->size(0) - 1 == sequences.count, "cu_seqlens name ", sequences.count,
                    " sequences of queries and ", lengths_k->size(0) - 1, " of keys");
    sequences.cu_q = static_cast<const int32_t*>(lengths_q->const_data_ptr());
    sequences.cu_k = static_cast<const int32_t*>(lengths_k->const_data_ptr());
  }
  const OnDeviceOf device(scores);
  const bool wide = scores.scalar_type() == ScalarType::Double;
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
