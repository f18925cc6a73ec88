#include "cuda/sm90/tile_map.h"

#include <cuda_runtime_api.h>

#include "cuda/common/device.h"

namespace sparsek::cuda::sm90 {
namespace {

// From the driver, which this library is not linked with.
auto find_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
             "cudaGetDriverEntryPointByVersion");
  STD_TORCH_CHECK(found == cudaDriverEntryPointSuccess, "the driver has no cuTensorMapEncodeTiled");
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
}

}  // namespace

CUtensorMap make_tile_map(const Rows& tensor, int64_t batches, int64_t queries, int64_t heads, int32_t tile_heads,
                          int32_t rows) {
  static const auto encode = find_encoder();
  const auto type = tensor.dtype == torch::headeronly::ScalarType::BFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                                            : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  // The stride of a dimension of size 1 may be anything, but the driver wants it aligned.
  const auto step = [&](int d, int64_t size) {
    return static_cast<cuuint64_t>(size == 1 ? 16 : tensor.stride[d] * tensor.element_size);
  };
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(tensor.width), static_cast<cuuint64_t>(heads),
                               static_cast<cuuint64_t>(queries), static_cast<cuuint64_t>(batches)};
  const cuuint64_t steps[3] = {step(2, heads), step(1, queries), step(0, batches)};
  const cuuint32_t box[4] = {64, static_cast<cuuint32_t>(tile_heads), static_cast<cuuint32_t>(rows / tile_heads), 1};
  const cuuint32_t ones[4] = {1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result =
      encode(&map, type, 4, tensor.data, sizes, steps, box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(result == CUDA_SUCCESS, "cuTensorMapEncodeTiled failed with ", static_cast<int>(result));
  return map;
}

}  // namespace sparsek::cuda::sm90
