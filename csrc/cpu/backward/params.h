// Everything the backward kernel reads and writes.
#pragma once

#include <cstdint>
#include <vector>

#include "common/pattern.h"
#include "cpu/common/sequences.h"
#include "cpu/common/tensor.h"

namespace sparsek::cpu {

// T is the dtype of computation: double for double inputs, float for all others.
template <typename T>
struct BackwardParams {
  Rows query;               // [B, Mq, H, K]
  Rows key;                 // [B, Mk, G, K]
  Rows value;               // [B, Mk, G, Kv]
  const T* scores;          // [B, G, Mk]
  const T* threshold;       // [B, G, Mq]
  const int32_t* expiry;    // [B, G, Mk]
  Rows out;                 // [B, Mq, H, Kv]
  const T* lse;             // [B, H, Mq]
  Rows grad_out;            // [B, Mq, H, Kv]
  const T* grad_lse;        // [B, H, Mq], or null
  Rows grad_query;          // [B, Mq, H, K]
  T* grad_key;              // [B, Mk, G, K], zeroed: sums
  T* grad_value;            // [B, Mk, G, Kv], zeroed: sums
  double* key_sums;         // [B, G, Mk], zeroed: of the gate gradients of each fractional key, over queries
  double* query_sums;       // [B, G, Mq], zeroed: of the same, over keys
  Rows grad_scores;         // [B, Mk, G], the scores of one head as a row
  int64_t queries;          // Mq
  int64_t keys;             // Mk
  int64_t groups;           // G
  int64_t heads_per_group;  // H / G
  double scale;
  Pattern pattern;
  std::vector<Sequence> sequences;
};

// Gradients of query, key and value, and the sums of the gate gradients.
template <typename T>
void run_backward(const BackwardParams<T>& params);

// Gradients of the scores from those sums.
template <typename T>
void run_score_gradient(const BackwardParams<T>& params);

}  // namespace sparsek::cpu
