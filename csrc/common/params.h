// What the forward and the backward kernels read, on all devices.
#pragma once

#include <cstdint>
#include <utility>

#include "common/checks.h"
#include "common/pattern.h"
#include "common/rows.h"
#include "common/tensor.h"

namespace sparsek {

// T is the dtype of computation: double for double inputs, float for all others. S lists the sequences of a call.
template <typename T, typename S>
struct AttentionInputs {
  Rows query;               // [B, Mq, H, K]
  Rows key;                 // [B, Mk, G, K]
  Rows value;               // [B, Mk, G, Kv]
  const T* scores;          // [B, G, Mk]
  const T* threshold;       // [B, G, Mq]
  const int32_t* expiry;    // [B, G, Mk]
  int64_t batch;            // B
  int64_t queries;          // Mq
  int64_t keys;             // Mk
  int64_t groups;           // G
  int64_t heads_per_group;  // H / G
  double scale;
  Pattern pattern;
  S sequences;
};

// Fills in all of the above; `scores` must be what transpose_scores returns.
template <typename T, typename S>
void set_inputs(AttentionInputs<T, S>& params, const Tensor& query, const Tensor& key, const Tensor& value,
                const Tensor& scores, const Tensor& threshold, const Tensor& expiry, const AttentionShape& shape,
                double scale, const Pattern& pattern, S sequences) {
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
  params.sequences = std::move(sequences);
}

}  // namespace sparsek
