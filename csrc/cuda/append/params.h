// What the kernel of the operator `append` reads and writes.
#pragma once

#include <cuda_runtime_api.h>

#include "common/cache.h"

namespace sparsek::cuda {

// Scores are held in shared memory, of which every GPU has this much and some more: 22 thousand slots in float32.
constexpr int64_t kMaxSlotBytes = 88 * 1024;

template <typename T>
void launch_append(const AppendParams<T>& params, cudaStream_t stream);

}  // namespace sparsek::cuda
