// What the launches of all Hopper kernels share.
#pragma once

#include <algorithm>

#include "cuda/common/params.h"

namespace sparsek::cuda::sm90 {

constexpr double kLog2e = 1.4426950408889634;  // softmax is taken in base 2

// Columns that the kernels have for K and Kv.
inline int padded_width(const AttentionParams<float>& params) {
  return std::max(params.query.width, params.value.width) <= 64 ? 64 : 128;
}

}  // namespace sparsek::cuda::sm90
