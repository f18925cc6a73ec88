// What the forward and the backward kernels both read. Passed to kernels by value.
#pragma once

#include <cstdint>

#include "common/pattern.h"
#include "common/rows.h"
#include "cuda/common/sequences.h"

namespace sparsek::cuda {

// T is the dtype of computation: double for double inputs, float for all others.
template <typename T>
struct AttentionParams {
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
  Sequences sequences;
};

}  // namespace sparsek::cuda
