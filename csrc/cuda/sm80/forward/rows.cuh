// Rows of 16-bit elements in shared memory.
#pragma once

#include "cuda/sm80/mma.cuh"

namespace sparsek::cuda::sm80 {

constexpr int kThreads = 128;
constexpr int kChunk = 8;  // elements copied at a time, 16 bytes

// Offset in bytes of a chunk. Swizzled: eight rows of the same column of chunks lie in different banks.
template <int kWidth>
__device__ constexpr uint32_t chunk_offset(int row, int chunk) {
  return row * kWidth * 2 + (chunk & ~7) * 16 + ((chunk ^ row) & 7) * 16;
}

// A thread copies chunk thread_chunk(), and those a multiple of 8 further, of the rows thread_row() + a multiple of
// kRowStep. The swizzle is the same for all of these rows.
constexpr int kRowStep = kThreads / 8;
__device__ inline int thread_row() { return static_cast<int>(threadIdx.x) / 8; }
__device__ inline int thread_chunk() { return static_cast<int>(threadIdx.x) % 8; }

struct SourceRow {
  const char* data;
  bool exists;  // else it is 0, and `data` points to some other row
};

// Copies rows of `width` elements; what is beyond them, and rows that do not exist, are 0.
template <int kRows, int kWidth, typename RowOf>
__device__ __forceinline__ void copy_rows_async(uint32_t shared, int64_t width, const RowOf& row_of) {
  SourceRow source[kRows / kRowStep];
#pragma unroll
  for (int i = 0; i < kRows / kRowStep; ++i) source[i] = row_of(thread_row() + i * kRowStep);
  const int chunks = static_cast<int>(width) / kChunk - thread_chunk();
  const uint32_t target = shared + chunk_offset<kWidth>(thread_row(), thread_chunk());
#pragma unroll
  for (int i = 0; i < kRows / kRowStep; ++i)
#pragma unroll
    for (int segment = 0; segment < kWidth / 64; ++segment)
      copy_async_16(target + i * kRowStep * kWidth * 2 + segment * 128,
                    source[i].data + thread_chunk() * 16 + segment * 128, source[i].exists && segment * 8 < chunks);
}

// Replaces elements of the chunks that this thread copied. Seldom needed: short code rather than fast.
template <typename T, int kRows, int kWidth, typename Replace>
__device__ __forceinline__ void replace_elements(char* rows, const Replace& replace) {
  char* source = rows + chunk_offset<kWidth>(thread_row(), thread_chunk());
#pragma unroll 1
  for (int i = 0; i < kRows / kRowStep; ++i)
#pragma unroll 1
    for (int segment = 0; segment < kWidth / 64; ++segment) {
      T* elements = reinterpret_cast<T*>(source + i * kRowStep * kWidth * 2 + segment * 128);
#pragma unroll
      for (int e = 0; e < kChunk; ++e) elements[e] = static_cast<T>(replace(static_cast<float>(elements[e])));
    }
}

// Addresses of fragments: matrices of 8 x 8 elements, two by two. `down` tells whether the second matrix of a thread's
// four lies below the first one, and the third beside it, or the other way round.
template <int kWidth>
struct FragmentRows {
  uint32_t base;  // of this lane's row and chunk in the fragment at row 0, column 0

  __device__ FragmentRows(uint32_t shared, bool down) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int second = lane / 8 % 2, third = lane / 16;
    const int row = lane % 8 + 8 * (down ? second : third), chunk = down ? third : second;
    base = shared + chunk_offset<kWidth>(row, chunk);
  }

  // Of the fragment at a row that is a multiple of 16, or 8, and a column that is one of 16.
  __device__ uint32_t at(int row, int column) const {
    return (base ^ (column % 64 * 2)) + row * kWidth * 2 + column / 64 * 128;
  }
};

}  // namespace sparsek::cuda::sm80
