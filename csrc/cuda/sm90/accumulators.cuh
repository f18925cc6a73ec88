// The 64 rows of a warpgroup's product, as the forward kernels hold them. A thread has two rows: elements 4 j, 4 j + 1
// are columns 8 j + 2 (lane % 4) and the next of its first row, 4 j + 2 and 4 j + 3 the same of the row 8 below.
#pragma once

#include "cuda/sm90/ptx.cuh"

namespace sparsek::cuda::sm90 {

constexpr float kLn2 = 0.6931471805599453f;

__device__ inline float reduce_max(float x) {  // over the four threads of a row
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ inline float reduce_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// Weights as the left operand of a product: the layouts match once neighbours share a register.
template <typename Element>
__device__ inline void pack_weights(const float (&weights)[32], uint32_t (&packed)[4][4]) {
#pragma unroll
  for (int k = 0; k < 4; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) packed[k][i] = pack<Element>(weights[8 * k + 2 * i], weights[8 * k + 2 * i + 1]);
}

// A warp's 16 rows in shared memory at `place`: its part of a tile of 64-element columns in the 128-byte swizzle;
// `stride` leads from one column to the next.
struct WarpRows {
  uint32_t place, stride;

  __device__ uint32_t chunk_of(int row, int chunk) const {
    return place + chunk / 8 * stride + row * 128 + (chunk ^ row) % 8 * 16;
  }
};

// Writes this warp's 16 rows there.
template <typename Element, int kWidth>
__device__ inline void stage_rows(const float (&out)[kWidth / 2], const WarpRows& rows) {
  const int lane = threadIdx.x % 32;
  __syncwarp();
#pragma unroll
  for (int j = 0; j < kWidth / 8; j += 2) {
    const uint32_t pairs[4] = {pack<Element>(out[4 * j], out[4 * j + 1]), pack<Element>(out[4 * j + 2], out[4 * j + 3]),
                               pack<Element>(out[4 * j + 4], out[4 * j + 5]),
                               pack<Element>(out[4 * j + 6], out[4 * j + 7])};
    store_matrices(rows.chunk_of(lane % 16, j + lane / 16), pairs);
  }
}

// Stores this warp's 16 rows of the output as floats, `chunks` of 8 each, row r to row_of(r) where that is not null.
template <int kWidth, typename RowOf>
__device__ inline void store_floats(const float (&out)[kWidth / 2], int chunks, const RowOf& row_of) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float2* row = reinterpret_cast<float2*>(row_of(lane / 4 + 8 * h));
    if (row == nullptr) continue;
#pragma unroll
    for (int j = 0; j < kWidth / 8; ++j)
      if (j < chunks) row[4 * j + lane % 4] = {out[4 * j + 2 * h], out[4 * j + 2 * h + 1]};
  }
}

}  // namespace sparsek::cuda::sm90
