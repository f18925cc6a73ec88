// Elements of any supported dtype, read and written in the dtype of computation.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

namespace sparsek::cuda {

template <typename Stored>
struct StoredAs {
  using type = Stored;
};

// Calls visit(StoredAs<...>) for the type behind a dtype: outside of loops, so that these stay free of branches.
template <typename Visit>
__device__ __forceinline__ void with_stored(torch::headeronly::ScalarType dtype, const Visit& visit) {
  using torch::headeronly::ScalarType;
  if (dtype == ScalarType::Float) return visit(StoredAs<float>{});
  if (dtype == ScalarType::BFloat16) return visit(StoredAs<__nv_bfloat16>{});
  if (dtype == ScalarType::Half) return visit(StoredAs<__half>{});
  visit(StoredAs<double>{});
}

template <typename T, typename Stored>
__device__ __forceinline__ T read(const char* row, int64_t offset) {
  const Stored x = reinterpret_cast<const Stored*>(row)[offset];
  if constexpr (sizeof(Stored) == 2) {
    return static_cast<T>(static_cast<float>(x));
  } else {
    return static_cast<T>(x);
  }
}

template <typename Stored, typename T>
__device__ __forceinline__ void write(char* row, int64_t offset, T x) {
  if constexpr (sizeof(Stored) == 2) {
    reinterpret_cast<Stored*>(row)[offset] = static_cast<Stored>(static_cast<float>(x));
  } else {
    reinterpret_cast<Stored*>(row)[offset] = static_cast<Stored>(x);
  }
}

}  // namespace sparsek::cuda
