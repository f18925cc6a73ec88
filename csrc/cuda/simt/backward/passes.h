// The passes of backward without tensor cores, in the order in which they run.
#pragma once

#include "cuda/backward/params.h"

namespace sparsek::cuda::simt {

// Gradients of the queries, and query_sums.
template <typename T>
void run_query_pass(const BackwardParams<T>& params, cudaStream_t stream);

// Sorts the keys of each sequence into `order` by how long queries see them: the few that are seen for long come to
// share tiles.
template <typename T>
void run_order(const BackwardParams<T>& params, cudaStream_t stream);

// Gradients of the keys and values, and key_sums.
template <typename T>
void run_key_pass(const BackwardParams<T>& params, cudaStream_t stream);

}  // namespace sparsek::cuda::simt
