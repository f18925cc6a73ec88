// Wrappers of instructions that all tensor-core kernels use.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace sparsek::cuda {

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes from global to shared memory.
__device__ inline void copy_async_16(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}
// The same, or writes 16 zero bytes without reading anything.
__device__ inline void copy_async_16(uint32_t shared, const void* global, bool read) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(read ? 16 : 0)
               : "memory");
}

// 2^x; -inf gives 0.
__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Four 8x8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
__device__ inline void load_matrices(uint32_t (&r)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared));
}

// Two floats rounded to 16 bits, the first in the low half.
template <typename T>
__device__ inline uint32_t pack(float low, float high);
template <>
__device__ inline uint32_t pack<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ inline uint32_t pack<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Two 16-bit numbers times one, such as 0, 1 or -1.
template <typename T>
__device__ inline uint32_t multiply_pair(uint32_t pair, float factor);
template <>
__device__ inline uint32_t multiply_pair<__nv_bfloat16>(uint32_t pair, float factor) {
  const __nv_bfloat162 product = __hmul2(*reinterpret_cast<__nv_bfloat162*>(&pair), __float2bfloat162_rn(factor));
  return *reinterpret_cast<const uint32_t*>(&product);
}
template <>
__device__ inline uint32_t multiply_pair<__half>(uint32_t pair, float factor) {
  const __half2 product = __hmul2(*reinterpret_cast<__half2*>(&pair), __float2half2_rn(factor));
  return *reinterpret_cast<const uint32_t*>(&product);
}

}  // namespace sparsek::cuda
