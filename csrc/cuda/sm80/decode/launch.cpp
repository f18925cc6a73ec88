#include "cuda/sm80/decode/launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

namespace sparsek::cuda {

void run_decode(const ForwardParams<float>& params, const Rows& columns, const Tensor& reference, int multiprocessors,
                cudaStream_t stream) {
  constexpr int64_t kFewest = 192, kEnough = 385;  // keys of a CTA that still pay, and that hide what it costs to start
  constexpr int64_t kStep = 2 * sm80::kDecodeWarps;
  sm80::DecodeArguments arguments{};
  arguments.params = params;
  arguments.columns = columns;
  arguments.heads = static_cast<int32_t>(std::min<int64_t>(params.heads_per_group, sm80::kDecodeHeads));
  arguments.tiles = static_cast<int32_t>((params.heads_per_group + sm80::kDecodeHeads - 1) / sm80::kDecodeHeads);
  const auto parts_of = [&](int64_t size) { return (params.keys + size - 1) / size; };
  const int64_t tiles = std::max<int64_t>(params.batch * params.groups * arguments.tiles * params.queries, 1);
  const int64_t wanted =
      std::max(parts_of(kEnough), std::min(parts_of(kFewest), sm80::kDecodeResident * multiprocessors / tiles));
  const int64_t splits = std::clamp<int64_t>(wanted, 1, sm80::kMostSplits);
  const int64_t size = std::max<int64_t>((params.keys + splits * kStep - 1) / (splits * kStep), 1) * kStep;
  arguments.split_size = static_cast<int32_t>(size);
  arguments.splits = static_cast<int32_t>(std::max<int64_t>(parts_of(size), 1));
  const int64_t parts = tiles * arguments.splits * arguments.heads;
  Tensor workspace;
  if (arguments.splits > 1) {
    workspace = make_empty(reference, {parts * (params.value.width + 2)}, ScalarType::Float);
    arguments.partial = static_cast<float*>(workspace.mutable_data_ptr());
    arguments.weights = reinterpret_cast<float2*>(arguments.partial + parts * params.value.width);
  }
  const int width = std::max(params.query.width, params.value.width) <= 64 ? 64 : 128;
  const auto launch = params.query.dtype == ScalarType::BFloat16 ? sm80::launch_decode_of<__nv_bfloat16>
                                                                 : sm80::launch_decode_of<__half>;
  launch(arguments, width, stream);
}

}  // namespace sparsek::cuda
