#include "cuda/sm90/forward/launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>

#include "cuda/sm90/forward/arguments.h"
#include "cuda/sm90/launch.h"

namespace sparsek::cuda {

void run_forward_sm90(const ForwardParams<float>& params, const Plan& plan, const Tensor& reference,
                      int multiprocessors, cudaStream_t stream) {
  sm90::ForwardArguments arguments{};
  arguments.params = params;
  arguments.plan = plan;
  arguments.heads = heads_per_tile(params.heads_per_group);
  arguments.tiles = query_tiles(kForwardRowsSm90, arguments.heads);
  arguments.num_tiles = params.sequences.num_items(params.sequences.cu_q, params.queries, arguments.tiles);
  arguments.sign = params.scale > 0 ? 1.0f : params.scale < 0 ? -1.0f : 0.0f;
  arguments.magnitude = params.scale == 0 ? 1.0f : static_cast<float>(std::abs(params.scale) * sm90::kLog2e);
  const int64_t packs_per_group = params.heads_per_group / arguments.heads;
  arguments.packs = params.groups * packs_per_group;
  const int64_t all_work = arguments.num_tiles * arguments.packs;
  if (all_work == 0) return;
  static_assert(kForwardRowsSm90 == 64 * sm90::kForwardConsumers);
  const int width = sm90::padded_width(params);
  // Fewer tiles are done before the rows would be copied.
  constexpr int64_t kFewestTiles = 8;  // of a multiprocessor
  const int64_t rounds = all_work / multiprocessors;
  const int64_t readers = (params.pattern.causal ? plan.runs.size : params.queries) / arguments.tiles.size;
  const sm90::CompactMemory copies =
      sm90::make_compact(params, plan, width, rounds < kFewestTiles ? 0 : readers, reference);
  arguments.compact = copies.compact;
  const auto launch = params.query.dtype == torch::headeronly::ScalarType::BFloat16
                          ? sm90::launch_forward_of<__nv_bfloat16>
                          : sm90::launch_forward_of<__half>;
  // Some groups after others, where there is no room for the rows of all: but not so few that multiprocessors idle.
  const int64_t most_parts = std::max<int64_t>(1, std::min(copies.parts, rounds / kFewestTiles));
  const int64_t most = (params.groups + most_parts - 1) / most_parts, parts = (params.groups + most - 1) / most;
  // Zeros: tiles without queries are never written. First one count of tiles, in 64 bits, for each part.
  const Tensor zeros = make_zeros(reference, {2 * parts + all_work * sm90::kForwardConsumers}, ScalarType::Int);
  arguments.taken = static_cast<uint64_t*>(zeros.mutable_data_ptr());
  arguments.suspects = reinterpret_cast<uint32_t*>(arguments.taken + parts);
  sm90::allocate_units(params, plan, arguments.compact, most, stream);
  for (int64_t part = 0; part < parts; ++part, ++arguments.taken) {
    const int64_t first = part * most, groups = std::min(most, params.groups - first);
    sm90::copy_units(params, plan, width, arguments.compact, part, stream);
    arguments.first_pack = first * packs_per_group;
    arguments.work = arguments.num_tiles * groups * packs_per_group;
    launch(arguments, width, false, multiprocessors, stream);
  }
  arguments.compact = {};  // of the last part alone
  arguments.first_pack = 0;
  arguments.work = all_work;
  launch(arguments, width, true, multiprocessors, stream);
}

}  // namespace sparsek::cuda
