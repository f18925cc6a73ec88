// Forward for few queries, as in generation, on every GPU from compute capability 8.0: for bfloat16 and float16.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/forward/params.h"

namespace sparsek::cuda {

// Up to so many queries, not packed; K and Kv up to 128, multiples of 8; last strides 1 and rows aligned to 16 bytes;
// `out` contiguous, in the dtype of the inputs or float32. `columns`: of the scores, float32, which are read in place
// of params.scores.
constexpr int64_t kMaxDecodeQueries = 8;
constexpr int64_t kMaxDecodeWidth = 128;
void run_decode(const ForwardParams<float>& params, const Rows& columns, const Tensor& reference, int multiprocessors,
                cudaStream_t stream);

namespace sm80 {

constexpr int kDecodeWarps = 4;     // of a CTA
constexpr int kDecodeResident = 3;  // CTAs on a multiprocessor together
constexpr int kDecodeHeads = 8;     // of a CTA: as many as the products have columns
constexpr int kMostSplits = 64;     // of the keys

// Keys are shared out among CTAs, more of them where there is little else to do; another kernel puts their results
// together.
struct DecodeArguments {
  ForwardParams<float> params;
  Rows columns;        // of the scores
  int32_t split_size;  // keys of a CTA
  int32_t splits;
  int32_t heads;    // query heads of a CTA, all of one group
  int32_t tiles;    // of so many heads in a group
  float* partial;   // [B, G, tiles, Mq, splits, heads, Kv]: sums of weighted values; null: one CTA has all keys
  float2* weights;  // [B, G, tiles, Mq, splits, heads]: what the weights are relative to, in base 2, and their sum
};

// `width`: of the kernels, 64 or 128.
template <typename Element>
void launch_decode_of(const DecodeArguments& arguments, int width, cudaStream_t stream);

}  // namespace sm80
}  // namespace sparsek::cuda
