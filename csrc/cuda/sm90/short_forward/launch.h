// Forward on Hopper where all queries of a key/value head see the same keys, and few: for bfloat16 and float16.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/forward/params.h"

namespace sparsek::cuda {

// What run_forward_sm90 takes, not causal, not packed and with at most so many keys. `columns`: of the scores, which
// are read in place of params.scores.
constexpr int64_t kMaxShortKeysSm90 = 2048;
void run_short_forward_sm90(const ForwardParams<float>& params, const Rows& columns, int multiprocessors,
                            cudaStream_t stream);

namespace sm90 {

struct ShortForwardArguments;
// `width`: of the kernels, 64 or 128. Jobs, splits and job_rows are not set yet.
template <typename Element>
void launch_short_forward_of(const ShortForwardArguments& arguments, int width, int multiprocessors,
                             cudaStream_t stream);

}  // namespace sm90
}  // namespace sparsek::cuda
