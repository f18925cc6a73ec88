// Matrix products of a warpgroup, asynchronous: wgmma.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace sparsek::cuda::sm90 {

__device__ inline void mma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void mma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
__device__ inline void mma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// Keeps the compiler from moving accesses of accumulators over the asynchronous products.
template <int N>
__device__ inline void mma_pin(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// The same for left factors in registers, which the products read until they are done: to be called after the wait.
__device__ inline void mma_pin(uint32_t (&a)[4][4]) {
#pragma unroll
  for (int i = 0; i < 16; ++i) asm volatile("" : "+r"(a[i / 4][i % 4])::"memory");
}

// Shared memory of rows of 128 bytes in the 128-byte swizzle: 16-byte chunk c of row r lies at chunk c ^ (r % 8).
// `stride` leads from one column of 64 elements to the next, for operands whose columns run along the rows
// (transposed).
__device__ inline uint64_t matrix_descriptor(uint32_t shared, uint32_t stride) {
  constexpr uint64_t kSwizzle128 = 1ull << 62;
  constexpr uint64_t kEightRows = 1024 >> 4;
  return kSwizzle128 | kEightRows << 32 | static_cast<uint64_t>((stride & 0x3ffff) >> 4) << 16 |
         (shared & 0x3ffff) >> 4;
}

// The descriptor of a matrix so many bytes further.
__device__ inline uint64_t advance(uint64_t descriptor, uint32_t bytes) { return descriptor + (bytes >> 4); }
// The same by its lower half, for nothing is carried: fewer instructions where a kernel keeps descriptors.
__device__ inline uint64_t advance_low(uint64_t descriptor, uint32_t bytes) {
  return descriptor >> 32 << 32 | (static_cast<uint32_t>(descriptor) + (bytes >> 4));
}

// The operands of 32 and of 64 accumulators, for which there is no shorter form.
#define SPARSEK_NAMES_32                                                   \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SPARSEK_NAMES_64                                                               \
  SPARSEK_NAMES_32                                                                     \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SPARSEK_8(mode, d, i)                                                                                 \
  mode(d[i]), mode(d[i + 1]), mode(d[i + 2]), mode(d[i + 3]), mode(d[i + 4]), mode(d[i + 5]), mode(d[i + 6]), \
      mode(d[i + 7])
#define SPARSEK_32(mode, d, i) \
  SPARSEK_8(mode, d, i), SPARSEK_8(mode, d, i + 8), SPARSEK_8(mode, d, i + 16), SPARSEK_8(mode, d, i + 24)
#define SPARSEK_64(mode, d) SPARSEK_32(mode, d, 0), SPARSEK_32(mode, d, 32)
// For T, either 16-bit format; `add` names an operand or a number that is 0 where there is nothing to add to.
#define SPARSEK_WGMMA(size, names, factors, add, accumulators, ...)                                 \
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {                                                 \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " add                                            \
                 ", 0;\n"                                                                           \
                 "wgmma.mma_async.sync.aligned." size ".f32.bf16.bf16 {" names "}, " factors ";\n}" \
                 : accumulators                                                                     \
                 : __VA_ARGS__);                                                                    \
  } else {                                                                                          \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " add                                            \
                 ", 0;\n"                                                                           \
                 "wgmma.mma_async.sync.aligned." size ".f32.f16.f16 {" names "}, " factors ";\n}"   \
                 : accumulators                                                                     \
                 : __VA_ARGS__);                                                                    \
  }

// d [64 x N] (+)= a [64 x 16] b [16 x N], N being the number of accumulators times 2; a and b in shared memory, b as N
// rows of 16 elements. Takes nothing from registers, so that the warp goes on at once.
template <typename T>
__device__ inline void multiply_shared(float (&d)[32], uint64_t a, uint64_t b, bool add) {
  SPARSEK_WGMMA("m64n64k16", SPARSEK_NAMES_32, "%32, %33, p, 1, 1, 0, 0", "%34", SPARSEK_32("+f", d, 0), "l"(a), "l"(b),
                "r"(static_cast<int>(add)));
}
template <typename T>
__device__ inline void multiply_shared(float (&d)[64], uint64_t a, uint64_t b, bool add) {
  SPARSEK_WGMMA("m64n128k16", SPARSEK_NAMES_64, "%64, %65, p, 1, 1, 0, 0", "%66", SPARSEK_64("+f", d), "l"(a), "l"(b),
                "r"(static_cast<int>(add)));
}

// The same without anything to add to: the registers are free until then.
template <typename T>
__device__ inline void begin_shared(float (&d)[32], uint64_t a, uint64_t b) {
  SPARSEK_WGMMA("m64n64k16", SPARSEK_NAMES_32, "%32, %33, p, 1, 1, 0, 0", "0", SPARSEK_32("=f", d, 0), "l"(a), "l"(b));
}
template <typename T>
__device__ inline void begin_shared(float (&d)[64], uint64_t a, uint64_t b) {
  SPARSEK_WGMMA("m64n128k16", SPARSEK_NAMES_64, "%64, %65, p, 1, 1, 0, 0", "0", SPARSEK_64("=f", d), "l"(a), "l"(b));
}

// The same as multiply_shared with both in columns: a as 16 rows of 64 elements, b as 16 rows of N.
template <typename T>
__device__ inline void multiply_columns(float (&d)[32], uint64_t a, uint64_t b, bool add) {
  SPARSEK_WGMMA("m64n64k16", SPARSEK_NAMES_32, "%32, %33, p, 1, 1, 1, 1", "%34", SPARSEK_32("+f", d, 0), "l"(a), "l"(b),
                "r"(static_cast<int>(add)));
}

// d [64 x N] += a [64 x 16] b [16 x N], a in registers, which the warp waits for, and b as 16 rows of N elements.
template <typename T>
__device__ inline void multiply_registers(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
  SPARSEK_WGMMA("m64n64k16", SPARSEK_NAMES_32, "{%32, %33, %34, %35}, %36, p, 1, 1, 1", "1", SPARSEK_32("+f", d, 0),
                "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
template <typename T>
__device__ inline void multiply_registers(float (&d)[64], const uint32_t (&a)[4], uint64_t b) {
  SPARSEK_WGMMA("m64n128k16", SPARSEK_NAMES_64, "{%64, %65, %66, %67}, %68, p, 1, 1, 1", "1", SPARSEK_64("+f", d),
                "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

#undef SPARSEK_NAMES_32
#undef SPARSEK_NAMES_64
#undef SPARSEK_8
#undef SPARSEK_32
#undef SPARSEK_64
#undef SPARSEK_WGMMA

}  // namespace sparsek::cuda::sm90
