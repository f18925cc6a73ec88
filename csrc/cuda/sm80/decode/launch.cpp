#include "cuda/sm80/decode/launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

namespace sparsek::cuda {

void run_decode(const ForwardParams<float>& params, const Rows& columns, const Tensor& reference, cudaStream_t stream) {
  constexpr int64_t kFewestKeys = 256;
  sm80::DecodeArguments arguments{};
  arguments.params = params;
  arguments.columns = columns;
  arguments.heads = static_cast<int32_t>(std::min<int64_t>(params.heads_per_group, sm80::kDecodeHeads));
  arguments.tiles = static_cast<int32_t>((params.heads_per_group + sm80::kDecodeHeads - 1) / sm80::kDecodeHeads);
  const int64_t size = (params.keys + sm80::kMostSplits - 1) / sm80::kMostSplits;
  arguments.split_size = std::max(kFewestKeys, (size + 31) / 32 * 32);
  arguments.splits =
      static_cast<int32_t>(std::max<int64_t>((params.keys + arguments.split_size - 1) / arguments.split_size, 1));
  const int64_t parts =
      params.batch * params.groups * arguments.tiles * params.queries * arguments.splits * arguments.heads;
  Tensor workspace;
  if (arguments.splits > 1) {
    workspace = make_empty(reference, {parts * (params.value.width + 2)}, ScalarType::Float);
    arguments.weights = static_cast<float2*>(workspace.mutable_data_ptr());
    arguments.partial = reinterpret_cast<float*>(arguments.weights + parts);
  }
  const int width = std::max(params.query.width, params.value.width) <= 64 ? 64 : 128;
  const auto launch = params.query.dtype == ScalarType::BFloat16 ? sm80::launch_decode_of<__nv_bfloat16>
                                                                 : sm80::launch_decode_of<__half>;
  launch(arguments, width, stream);
}

}  // namespace sparsek::cuda
