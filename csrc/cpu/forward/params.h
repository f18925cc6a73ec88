// Everything the forward kernel reads and writes.
#pragma once

#include <cstdint>
#include <vector>

#include "common/pattern.h"
#include "cpu/common/sequences.h"
#include "cpu/common/tensor.h"
#include "cpu/selection/plan.h"

namespace sparsek::cpu {

// T is the dtype of computation: double for double inputs, float for all others.
template <typename T>
struct ForwardParams {
  Rows query;               // [B, Mq, H, K]
  Rows key;                 // [B, Mk, G, K]
  Rows value;               // [B, Mk, G, Kv]
  const T* scores;          // [B, G, Mk]
  const T* threshold;       // [B, G, Mq]
  const int32_t* expiry;    // [B, G, Mk]
  Rows out;                 // [B, Mq, H, Kv]
  T* lse;                   // [B, H, Mq]
  int64_t queries;          // Mq
  int64_t keys;             // Mk
  int64_t groups;           // G
  int64_t heads_per_group;  // H / G
  double scale;
  Pattern pattern;
  std::vector<Sequence> sequences;
};

template <typename T>
void run_forward(const ForwardParams<T>& params);

}  // namespace sparsek::cpu
