#include "cuda/sm90/backward/launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/common/device.h"
#include "cuda/sm90/backward/arguments.h"
#include "cuda/sm90/launch.h"

namespace sparsek::cuda {

void run_backward_sm90(const BackwardParams<float>& params, const Plan& plan, const Tensor& reference,
                       int multiprocessors, cudaStream_t stream) {
  const Sequences& sequences = params.sequences;
  if (sequences.count == 0) return;
  sm90::BackwardArguments arguments{};
  arguments.params = params;
  arguments.plan = plan;
  arguments.width = sm90::padded_width(params);
  arguments.tiles = query_tiles(sm90::tile_rows(arguments.width), 1);
  arguments.num_tiles = sequences.num_items(sequences.cu_q, params.queries, arguments.tiles);
  arguments.num_runs = sequences.num_items(sequences.cu_k, params.keys, plan.runs);
  arguments.num_blocks = sequences.num_items(sequences.cu_k, params.keys, {sm90::kKeys, 1});
  const int64_t tiles = params.groups * params.heads_per_group * arguments.num_tiles;

  const Tensor tile_sums = make_empty(reference, {tiles, sm90::tile_floats(arguments.width)}, ScalarType::Float);
  const Tensor grad_key =
      make_empty(reference, {params.batch, params.groups, params.keys, params.query.width}, ScalarType::Float);
  const Tensor grad_value =
      make_empty(reference, {params.batch, params.groups, params.keys, params.value.width}, ScalarType::Float);
  arguments.tile_sums = static_cast<float*>(tile_sums.mutable_data_ptr());
  arguments.grad_key = static_cast<float*>(grad_key.mutable_data_ptr());
  arguments.grad_value = static_cast<float*>(grad_value.mutable_data_ptr());

  // Both passes count for themselves. First units need no more room than one for each list.
  const int64_t lists = arguments.num_runs * params.groups, per_pass = 2 + lists + 2 * tiles;
  const Tensor counters =
      make_zeros(reference, {2 * per_pass + params.batch * params.groups + 1 + lists + 1}, ScalarType::Int);
  int32_t* const counter = static_cast<int32_t*>(counters.mutable_data_ptr());
  arguments.suspects = counter + 2 * per_pass;
  arguments.first_unit = arguments.suspects + params.batch * params.groups + 1;
  sm90::launch_count(arguments, stream);
  const auto launch = params.query.dtype == ScalarType::BFloat16 ? sm90::launch_backward_of<__nv_bfloat16>
                                                                 : sm90::launch_backward_of<__half>;
  for (const bool careful : {false, true}) {
    int32_t* const own = counter + careful * per_pass;
    arguments.added = own + 2;
    arguments.turns = arguments.added + lists;
    arguments.window_turns = arguments.turns + tiles;
    for (const bool windows : {true, false}) {
      if (windows && params.pattern.window == 0) continue;
      arguments.windows = windows;
      arguments.ticket = own + windows;
      launch(arguments, careful, multiprocessors, stream);
    }
    sm90::launch_finish(arguments, careful, multiprocessors, stream);
  }
}

}  // namespace sparsek::cuda
