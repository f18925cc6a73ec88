// Tiles of rows in shared memory, and the products of warps over them.
//
// NaN and infinity may lie in rows of which a tile's weights are partly 0, and 0 * NaN must not reach who does not see
// them. Where a result is not finite, its tile is done again with care.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/sm80/mma.cuh"

namespace sparsek::cuda::sm80 {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;

// Rows of W 16-bit elements in chunks of 16 bytes. Where a chunk lies depends on its row, so that eight rows of one
// column are in different banks; an exclusive or with 2 * column leads from one column to another.
template <int W>
constexpr int kRowBytes = 2 * W;

template <int W>
__device__ __forceinline__ uint32_t chunk_offset(int row, int chunk) {
  return row * kRowBytes<W> + ((chunk ^ (row & 7)) << 4);
}

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) % 32; }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x) / 32; }

// Copies `kRows` rows by all threads. visit(row, copy) calls copy(address of the row, whether to read it); rows that
// are not read become zeros, and so do columns from `width` on.
template <int W, int kRows, typename Visit>
__device__ __forceinline__ void copy_rows(uint32_t tile, int width, const Visit& visit) {
  constexpr int kChunks = W / 8, kRowsPerStep = kThreads / kChunks;
  const int chunk = static_cast<int>(threadIdx.x) % kChunks, first = static_cast<int>(threadIdx.x) / kChunks;
  const bool exists = 8 * chunk < width;
#pragma unroll
  for (int step = 0; step < kRows / kRowsPerStep; ++step) {
    const int row = first + step * kRowsPerStep;
    visit(row, [&](const char* from, bool read) {
      copy_async_16(tile + chunk_offset<W>(row, chunk), from + 16 * (exists ? chunk : 0), read && exists);
    });
  }
}

// The same for the first `count` of rows that are `stride` bytes apart.
template <int W, int kRows>
__device__ __forceinline__ void copy_adjacent_rows(uint32_t tile, int width, const char* rows, int64_t stride,
                                                   int count) {
  constexpr int kRowsPerStep = kThreads / (W / 8);
  const char* from = rows + static_cast<int>(threadIdx.x) / (W / 8) * stride;
  copy_rows<W, kRows>(tile, width, [&](int row, const auto& copy) {
    copy(row < count ? from : rows, row < count);
    from += kRowsPerStep * stride;
  });
}

constexpr int kAhead = 2;  // how many multiplications before its use a fragment is loaded

// acc += a b^T over the first `width` columns, for 16 kTiles rows of a and 8 kColumns rows of b. Of each 16 x 8 tile,
// as everywhere, lane 4 g + t holds columns 2 t and 2 t + 1 of the rows g and g + 8.
template <typename T, int W, int kTiles, int kColumns>
__device__ __forceinline__ void multiply_transposed(float (&acc)[kTiles][kColumns][4], uint32_t a, uint32_t b,
                                                    int width) {
  constexpr int kSteps = kColumns / 2, kTotal = W / 16 * kSteps;
  const int lane = lane_id();
  const uint32_t lane_a = a + chunk_offset<W>(lane % 16, lane / 16);
  const uint32_t lane_b = b + chunk_offset<W>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  uint32_t left[2][kTiles][4], right[kAhead + 1][4];
  const auto load = [&](int i) {
    const int k = i / kSteps, n = i % kSteps;
    if (n == 0) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m) load_matrices(left[k % 2][m], (lane_a ^ (32 * k)) + m * 16 * kRowBytes<W>);
    }
    load_matrices(right[i % (kAhead + 1)], (lane_b ^ (32 * k)) + n * 16 * kRowBytes<W>);
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i) load(i);
#pragma unroll
  for (int i = 0; i < kTotal; ++i) {
    if (i % (4 * kSteps) == 0 && i / kSteps * 16 >= width) break;
    if (i + kAhead < kTotal) load(i + kAhead);
    const int k = i / kSteps, n = 2 * (i % kSteps);
    const uint32_t (&factor)[4] = right[i % (kAhead + 1)];
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      multiply_add<T>(acc[m][n], left[k % 2][m], factor[0], factor[1]);
      multiply_add<T>(acc[m][n + 1], left[k % 2][m], factor[2], factor[3]);
    }
  }
}

// A matrix in registers, rounded, as the left factor of a product.
template <typename T, int kTiles, int kColumns>
__device__ __forceinline__ void round_factor(uint32_t (&factor)[kTiles][kColumns / 2][4],
                                             const float (&x)[kTiles][kColumns][4]) {
#pragma unroll
  for (int m = 0; m < kTiles; ++m)
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      factor[m][n / 2][n % 2 * 2] = pack<T>(x[m][n][0], x[m][n][1]);
      factor[m][n / 2][n % 2 * 2 + 1] = pack<T>(x[m][n][2], x[m][n][3]);
    }
}

// Bits of a pair of 16-bit numbers: all ones in the halves whose magnitude is at least `least`.
__device__ __forceinline__ uint32_t where_at_least(uint32_t pair, uint32_t least) {
  const uint32_t carry = ((pair & 0x7fff7fffu) + 0x10001u * (0x8000u - least)) & 0x80008000u;
  return (carry >> 15) * 0xffffu;
}

// The largest bfloat16 with the signs of a pair: the product of two of them overflows.
__device__ __forceinline__ uint32_t huge_like(uint32_t pair) { return (pair & 0x80008000u) | 0x7f7f7f7fu; }

// What stands for the elements of a pair that are not finite: `due` is huge for them and `opposite`, of the other sign,
// for NaN. Times a huge weight, they give infinity, or NaN together; times 0, they give 0.
struct Poison {
  uint32_t due, opposite;
};

template <typename T>
__device__ __forceinline__ Poison take_poison(uint32_t& pair) {
  constexpr uint32_t kInfiniteBits = std::is_same_v<T, __half> ? 0x7c00u : 0x7f80u;
  const uint32_t poisoned = where_at_least(pair, kInfiniteBits), nan = where_at_least(pair, kInfiniteBits + 1);
  const Poison poison{huge_like(pair) & poisoned, huge_like(~pair) & nan};
  pair &= ~poisoned;
  return poison;
}

// acc += factor b, for the 8 kColumns columns of b from `first` on, as far as they are below `width`. kCareful: what is
// not finite in b reaches the rows whose factor is not 0 there, and no other; the others' bits are the same either way.
template <typename T, int W, bool kCareful, int kTiles, int kColumns, int kSteps>
__device__ __forceinline__ void multiply_rows(float (&acc)[kTiles][kColumns][4],
                                              const uint32_t (&factor)[kTiles][kSteps][4], uint32_t b, int first,
                                              int width) {
  constexpr int kPairs = kColumns / 2, kTotal = kSteps * kPairs;
  const int lane = lane_id();
  const uint32_t lane_b = (b + chunk_offset<W>(lane % 16, lane / 16)) ^ (2 * first);
  uint32_t right[kAhead + 1][4];
  // 64 columns are done before the next ones begin.
  const auto column_of = [](int i) { return i / (4 * kSteps) * 8 + i % 4 * 2; };
  const auto step_of = [](int i) { return i / 4 % kSteps; };
  const auto load = [&](int i) {
    load_matrices_transposed(right[i % (kAhead + 1)], (lane_b ^ (16 * column_of(i))) + step_of(i) * 16 * kRowBytes<W>);
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i) load(i);
#pragma unroll
  for (int i = 0; i < kTotal; ++i) {
    const int n = column_of(i), s = step_of(i);
    if (i % (4 * kSteps) == 0 && first + 8 * n >= width) break;
    if (i + kAhead < kTotal) load(i + kAhead);
    uint32_t (&right_factor)[4] = right[i % (kAhead + 1)];
    if constexpr (kCareful) {
      Poison poison[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) poison[j] = take_poison<T>(right_factor[j]);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        uint32_t weights[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) weights[j] = huge_like(factor[m][s][j]) & where_at_least(factor[m][s][j], 1);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Poison &low = poison[2 * half], &high = poison[2 * half + 1];
          multiply_add<__nv_bfloat16>(acc[m][n + half], weights, low.due, high.due);
          multiply_add<__nv_bfloat16>(acc[m][n + half], weights, low.opposite, high.opposite);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      multiply_add<T>(acc[m][n], factor[m][s], right_factor[0], right_factor[1]);
      multiply_add<T>(acc[m][n + 1], factor[m][s], right_factor[2], right_factor[3]);
    }
  }
}

template <int kTiles, int kColumns>
__device__ __forceinline__ void set_zero(float (&acc)[kTiles][kColumns][4]) {
#pragma unroll
  for (int m = 0; m < kTiles; ++m)
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[m][n][i] = 0.0f;
}

template <int kTiles, int kColumns>
__device__ __forceinline__ bool all_finite(const float (&acc)[kTiles][kColumns][4]) {
  float sum = 0.0f;  // NaN if any term is not finite
#pragma unroll
  for (int m = 0; m < kTiles; ++m)
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum += 0.0f * acc[m][n][i];
  return sum == 0.0f;
}

}  // namespace sparsek::cuda::sm80
