#include "cuda/common/kernels.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace sparsek::cuda {
namespace {

#ifdef SPARSEK_SM90
constexpr bool kHasSm90 = true;
#else
constexpr bool kHasSm90 = false;
#endif

bool has_aligned_rows(const Tensor& tensor) {
  constexpr int64_t kBytes = 16;
  const int64_t size = static_cast<int64_t>(tensor.element_size());
  if (tensor.stride(3) != 1 || tensor.size(3) * size % kBytes != 0) return false;
  if (reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kBytes != 0) return false;
  if (tensor.stride(1) * size >= int64_t{1} << 32) return false;  // kernels multiply rows by 32 bits
  for (int64_t d = 0; d < 3; ++d)
    if (tensor.size(d) > 1 && tensor.stride(d) * size % kBytes != 0) return false;
  return true;
}

}  // namespace

Tensor with_aligned_rows(const Tensor& tensor) {
  if (has_aligned_rows(tensor)) return tensor;
  const Tensor dense = torch::stable::contiguous(tensor);
  return has_aligned_rows(dense) ? dense : torch::stable::clone(dense);
}

Kernel choose_kernel(const std::optional<std::string>& name, const OnDeviceOf& device, WidestHeads widest,
                     const Tensor& query, const Tensor& value) {
  STD_TORCH_CHECK(!name.has_value() || *name == "simt" || *name == "sm80" || *name == "sm90" || *name == "decode",
                  "CUDA has kernels decode, sm90, sm80 and simt, got ", *name);
  const ScalarType dtype = query.scalar_type();
  const int64_t width = std::max(query.size(3), value.size(3));
  const bool fits =
      (dtype == ScalarType::BFloat16 || dtype == ScalarType::Half) && query.size(3) % 8 == 0 && value.size(3) % 8 == 0;
  const bool sm80 = fits && width <= widest.sm80 && device.capability() >= 80;
  const bool sm90 = fits && width <= widest.sm90 && device.capability() == 90 && kHasSm90;
  const bool decode = fits && width <= widest.decode && device.capability() >= 80;
  if (!name.has_value()) return decode ? Kernel::kDecode : sm90 ? Kernel::kSm90 : sm80 ? Kernel::kSm80 : Kernel::kSimt;
  if (*name == "simt") return Kernel::kSimt;
  STD_TORCH_CHECK(*name == "sm80"   ? sm80
                  : *name == "sm90" ? sm90
                                    : decode,
                  "kernel ", *name, " cannot take these inputs: see choose_kernel in csrc/cuda/common/kernels.h");
  return *name == "sm80" ? Kernel::kSm80 : *name == "sm90" ? Kernel::kSm90 : Kernel::kDecode;
}

}  // namespace sparsek::cuda
