// Everything the backward kernels read and write.
#pragma once

#include <cuda_runtime_api.h>

#include "common/tensor.h"
#include "cuda/common/params.h"

namespace sparsek::cuda {

template <typename T>
struct BackwardParams : AttentionParams<T> {
  Rows out;            // [B, Mq, H, Kv]
  Rows grad_out;       // [B, Mq, H, Kv]
  const T* lse;        // [B, H, Mq]
  const T* grad_lse;   // [B, H, Mq], or null
  T* delta;            // [B, H, Mq]: rowsum(grad_out * out) - grad_lse
  int32_t* order;      // [B, G, Mk]: room for an order of each sequence's keys, in which they share tiles; simt alone
  Rows grad_query;     // [B, Mq, H, K]
  Rows grad_key;       // [B, Mk, G, K]
  Rows grad_value;     // [B, Mk, G, Kv]
  double* key_sums;    // [B, G, Mk]: of the gate gradients of each fractional key, over queries and heads of the group
  double* query_sums;  // [B, G, Mq]: of the same, over keys and heads of the group
  Rows grad_scores;    // [B, Mk, G], the scores of one head as a row
};

// Fills in delta: what the attention of a row loses by one more unit of softmax weight.
template <typename T>
void run_delta(const BackwardParams<T>& params, cudaStream_t stream);

// Gradients of query, key and value, and the sums of the gate gradients. Every dtype, width and stride, without tensor
// cores.
template <typename T>
void run_backward_simt(const BackwardParams<T>& params, cudaStream_t stream);

// Gradients of the scores from those sums; leaves other numbers in query_sums. Memory is taken beside `reference`.
template <typename T>
void run_score_gradient(const BackwardParams<T>& params, const Tensor& reference, cudaStream_t stream);

}  // namespace sparsek::cuda
