// Views of CUDA tensors as the kernels read them.
#pragma once

#include <optional>

#include "common/checks.h"
#include "common/tensor.h"
#include "cuda/common/params.h"

namespace sparsek::cuda {

// scores [B, Mk, G] of any dtype as contiguous [B, G, Mk] of T.
template <typename T>
Tensor transpose_scores(const Tensor& scores);

// The sequences of a call, and the tensors they point into: to be kept until the kernels are launched.
struct SequenceLengths {
  Tensor cu_q, cu_k;  // undefined where every batch entry is one sequence
  Sequences sequences;

  bool packed() const { return sequences.cu_q != nullptr; }
};

// What the lengths are, only the device knows: kernels clamp them.
SequenceLengths make_sequences(const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k,
                               const Tensor& reference, int64_t batch, int64_t queries, int64_t keys);

// Fills in all of AttentionParams; `scores` must be what transpose_scores returns.
template <typename T>
void set_inputs(AttentionParams<T>& params, const Tensor& query, const Tensor& key, const Tensor& value,
                const Tensor& scores, const Tensor& threshold, const Tensor& expiry, const AttentionShape& shape,
                double scale, const Pattern& pattern, const Sequences& sequences) {
  params.query = rows_of(query);
  params.key = rows_of(key);
  params.value = rows_of(value);
  params.scores = static_cast<const T*>(scores.const_data_ptr());
  params.threshold = static_cast<const T*>(threshold.const_data_ptr());
  params.expiry = static_cast<const int32_t*>(expiry.const_data_ptr());
  params.batch = shape.batch;
  params.queries = shape.queries;
  params.keys = shape.keys;
  params.groups = shape.groups;
  params.heads_per_group = shape.heads / shape.groups;
  params.scale = scale;
  params.pattern = pattern;
  params.sequences = sequences;
}

}  // namespace sparsek::cuda
