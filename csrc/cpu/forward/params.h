// Everything the forward kernel reads and writes.
#pragma once

#include "cpu/common/params.h"

namespace sparsek::cpu {

template <typename T>
struct ForwardParams : AttentionParams<T> {
  Rows out;  // [B, Mq, H, Kv]
  T* lse;    // [B, H, Mq]
};

template <typename T>
void run_forward(const ForwardParams<T>& params);

}  // namespace sparsek::cpu
