// Which kernels can run a call, and which one does.
#pragma once

#include <optional>
#include <string>

#include "cuda/common/device.h"

namespace sparsek::cuda {

enum class Kernel { kSimt, kSm80, kSm90, kDecode };

// The widest K and Kv of the tensor-core kernels of an operator; 0 where it has none, or none for this call.
struct WidestHeads {
  int64_t sm80, sm90, decode;
};

// The kernel called `name`, or by default the best one: that for few queries ("decode"), else Hopper's tensor cores
// ("sm90") on compute capability 9.0 exactly, those of every GPU from 8.0 ("sm80"), or plain CUDA cores ("simt").
// Tensor cores take bfloat16 and float16, with K and Kv multiples of 8; xformers_sparsek/xformers_ops.py says the same.
// How tensors lie in memory does not matter, so that it changes no result. Throws if a kernel chosen by name cannot
// take the inputs.
Kernel choose_kernel(const std::optional<std::string>& name, const OnDeviceOf& device, WidestHeads widest,
                     const Tensor& query, const Tensor& value);

// The tensor itself, or a copy where its rows cannot be copied by 16 bytes at a time, as tensor-core kernels do.
Tensor with_aligned_rows(const Tensor& tensor);

}  // namespace sparsek::cuda
