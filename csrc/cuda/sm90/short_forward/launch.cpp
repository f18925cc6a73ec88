#include "cuda/sm90/short_forward/launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/plan/plan.h"
#include "cuda/sm90/launch.h"
#include "cuda/sm90/short_forward/arguments.h"

namespace sparsek::cuda {

void run_short_forward_sm90(const ForwardParams<float>& params, const Rows& columns, int multiprocessors,
                            cudaStream_t stream) {
  sm90::ShortForwardArguments arguments{};
  arguments.params = params;
  arguments.columns = columns;
  const int32_t heads = heads_per_tile(params.heads_per_group);
  while (1 << arguments.log_heads < heads) ++arguments.log_heads;
  arguments.packs = params.heads_per_group / heads;
  arguments.rows = params.queries * heads;
  if (params.batch * params.queries * params.groups == 0) return;
  const auto tiles = [&](const Rows& tensor, int32_t rows) {
    return sm90::make_tile_map(tensor, params.batch, params.queries, params.groups * params.heads_per_group, heads,
                               rows);
  };
  arguments.queries = tiles(params.query, sm90::kShortTileRows);
  if (params.out.dtype == params.query.dtype) arguments.out = tiles(params.out, sm90::kShortTileRows / 4);
  arguments.factor = static_cast<float>(params.scale * sm90::kLog2e);
  const int width = sm90::padded_width(params);
  if (params.query.dtype == torch::headeronly::ScalarType::BFloat16) {
    sm90::launch_short_forward_of<__nv_bfloat16>(arguments, width, multiprocessors, stream);
  } else {
    sm90::launch_short_forward_of<__half>(arguments, width, multiprocessors, stream);
  }
}

}  // namespace sparsek::cuda
