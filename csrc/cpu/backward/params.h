// Everything the backward kernel reads and writes.
#pragma once

#include "cpu/common/params.h"

namespace sparsek::cpu {

template <typename T>
struct BackwardParams : AttentionParams<T> {
  Rows out;            // [B, Mq, H, Kv]
  const T* lse;        // [B, H, Mq]
  Rows grad_out;       // [B, Mq, H, Kv]
  const T* grad_lse;   // [B, H, Mq], or null
  Rows grad_query;     // [B, Mq, H, K]
  T* grad_key;         // [B, Mk, G, K], zeroed: sums
  T* grad_value;       // [B, Mk, G, Kv], zeroed: sums
  double* key_sums;    // [B, G, Mk], zeroed: of the gate gradients of each fractional key, over queries
  double* query_sums;  // [B, G, Mq], zeroed: of the same, over keys
  Rows grad_scores;    // [B, Mk, G], the scores of one head as a row
};

// Gradients of query, key and value, and the sums of the gate gradients.
template <typename T>
void run_backward(const BackwardParams<T>& params);

// Gradients of the scores from those sums.
template <typename T>
void run_score_gradient(const BackwardParams<T>& params);

}  // namespace sparsek::cpu
