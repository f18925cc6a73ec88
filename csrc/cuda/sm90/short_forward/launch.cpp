#include "cuda/sm90/short_forward/launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "cuda/plan/plan.h"
#include "cuda/sm90/short_forward/arguments.h"

namespace sparsek::cuda {
namespace {

bool has_near_heads(const Rows& rows) { return rows.stride[2] * rows.element_size < int64_t{1} << 32; }

sm90::RowSteps steps_of(const Rows& rows) {
  return {static_cast<uint32_t>(rows.stride[1] * rows.element_size),
          static_cast<uint32_t>(rows.stride[2] * rows.element_size)};
}

}  // namespace

void run_short_forward_sm90(const ForwardParams<float>& params, const Rows& columns, int multiprocessors,
                            cudaStream_t stream) {
  sm90::ShortForwardArguments arguments{};
  arguments.params = params;
  arguments.columns = columns;
  // Steps are multiplied by 32 bits.
  const int32_t heads = has_near_heads(params.query) ? heads_per_tile(params.heads_per_group) : 1;
  while (1 << arguments.log_heads < heads) ++arguments.log_heads;
  arguments.packs = params.heads_per_group / heads;
  arguments.rows = params.queries * heads;
  arguments.query_steps = steps_of(params.query);
  arguments.out_steps = steps_of(params.out);
  constexpr double kLog2e = 1.4426950408889634;
  arguments.factor = static_cast<float>(params.scale * kLog2e);
  const int width = std::max(params.query.width, params.value.width) <= 64 ? 64 : 128;
  if (params.query.dtype == torch::headeronly::ScalarType::BFloat16) {
    sm90::launch_short_forward_of<__nv_bfloat16>(arguments, width, multiprocessors, stream);
  } else {
    sm90::launch_short_forward_of<__half>(arguments, width, multiprocessors, stream);
  }
}

}  // namespace sparsek::cuda
