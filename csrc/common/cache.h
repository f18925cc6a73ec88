// The cache that generation appends to: what of the keys can still be seen, in memory that does not grow.
#pragma once

#include <cstdint>

#include "common/rows.h"
#include "common/tensor.h"

namespace sparsek {

// Thresholds never fall as tokens are appended, so a key whose gate is 0 is never seen again. What is left is kept in
// `slots` slots in no order, by its score, and behind them the latest `window` tokens as a ring, which are seen
// whatever their scores: the token at position p lies in place p % window. A key leaves the ring for a slot as its
// window ends.
//
// All pointers are into contiguous tensors, which an append changes. T is the dtype of scores: double for double
// inputs, float for all others.
template <typename T>
struct Cache {
  char* key;          // [B, G, slots + window, K]
  char* value;        // [B, G, slots + window, Kv]
  T* score;           // [B, G, slots + window]: of the key in a slot; +inf in the ring; -inf: none is there
  T* waiting;         // [B, G, window]: the scores of the ring's tokens
  int32_t* position;  // [B, G, slots]: of the key in a slot
  int32_t* next;      // [B, G]: the slot that is free from the next token on: an empty one, or that of the lowest score
  int64_t* length;    // [B, G]: tokens so far
  int64_t* overflow;  // [B, G]: keys that have lost their slots although they had gates above 0
  int64_t slots, window;
  int64_t key_bytes, value_bytes;  // of a row
};

// One token for each batch entry and key/value head.
template <typename T>
struct AppendParams {
  Rows key;      // [B, 1, G, K]
  Rows value;    // [B, 1, G, Kv]
  Rows columns;  // of scores [B, 1, G]
  Cache<T> cache;
  int64_t batch, groups;
  int64_t num_keys;  // k
  bool hard;
  T* threshold;     // [B, G, 1]: of the token's query; soft gates alone
  int32_t* expiry;  // [B, G, slots + window]: kNever where that query sees a key, else 0
};

// The tensors of a cache, as the operator `append` takes them.
struct CacheTensors {
  Tensor key, value, score, waiting, position, next, length, overflow;
};

// A tensor, or a copy of it, whose rows are bytes next to each other.
Tensor with_dense_rows(const Tensor& tensor);

// Throws unless all fit together; then everything but `threshold` and `expiry`. `key` and `value` have dense rows.
template <typename T>
AppendParams<T> make_append(const Tensor& key, const Tensor& value, const Tensor& scores, const CacheTensors& cache,
                            int64_t num_keys, int64_t window, bool hard);

}  // namespace sparsek
