// What the forward and the backward kernels both read. Passed to kernels by value.
#pragma once

#include "common/params.h"
#include "cuda/common/sequences.h"

namespace sparsek::cuda {

template <typename T>
using AttentionParams = AttentionInputs<T, Sequences>;

}  // namespace sparsek::cuda
