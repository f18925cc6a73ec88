// Backward by the tensor cores of every GPU from sm_80 on, for bfloat16 and float16.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/backward/params.h"
#include "cuda/plan/plan.h"

namespace sparsek::cuda {

// K and Kv up to 256, multiples of 8; last strides 1 and rows aligned to 16 bytes; grad_out and the gradients in the
// dtype of the inputs; delta filled in. Memory is taken beside `reference`. Runs of about 2048 positions are best:
// shorter ones add their sums more often, longer ones look at more pairs that are not seen.
constexpr int64_t kMaxBackwardWidthSm80 = 256;
void run_backward_sm80(const BackwardParams<float>& params, const Plan& plan, const Tensor& reference,
                       cudaStream_t stream);

namespace sm80 {

// Intermediate results.
struct Workspace {
  float* gate_sums;       // [B, H, Mq]: of the gate gradients of a row, over keys
  float* grad_key;        // [B, G, Mk, K]: sums, not scaled
  float* grad_value;      // [B, G, Mk, Kv]
  int32_t* ticket;        // [1], zeroed: the next item of the key pass
  int32_t* added;         // [runs, G], zeroed: how many items of a run have added their sums
  int64_t items_per_run;  // of the key pass
};

// Gradients of the queries, and gate_sums.
template <typename T, int W>
void launch_query_pass(const BackwardParams<float>& params, const Plan& plan, const Workspace& work,
                       cudaStream_t stream);

// The sums of the workspace for keys and values, and key_sums.
template <typename T, int W>
void launch_key_pass(const BackwardParams<float>& params, const Plan& plan, const Workspace& work, cudaStream_t stream);

// Gradients of the keys and values, and query_sums, from the workspace.
void launch_finish(const BackwardParams<float>& params, const Workspace& work, cudaStream_t stream);

// Keys of an item of the key pass.
constexpr int keys_per_item(int width) { return width <= 64 ? 128 : width <= 128 ? 64 : 32; }

// 2 where double buffers leave as many CTAs on a multiprocessor as single ones do, else 1.
int choose_stages(int64_t single_bytes, int64_t double_bytes);

}  // namespace sm80
}  // namespace sparsek::cuda
