// The online softmax over a block of keys, on the accumulators of m16n8k16.
//
// How a row is computed depends on nothing but the row: not on what the other rows of its tile see, nor on whether its
// block needs gates at all. Products are not contracted with sums, so that all of it rounds alike.
#pragma once

#include <limits>

#include "cuda/sm80/forward/blocks.cuh"

namespace sparsek::cuda::sm80 {

// Weights are relative to some logit of their row that is at most so much (in base 2) below the largest one so far;
// what was summed before is scaled when that moves.
constexpr float kSlack = 8.0f;

// Of the rows that a thread holds: 16 * m + 8 * i + lane / 4 of its warp's.
template <int kTiles>
struct RowState {
  float base[kTiles][2];  // what weights are relative to, in base 2; -inf before the first key
  float sum[kTiles][2];   // of the weights of this thread's columns
};

// What decides about the gates of a warp's rows.
struct GateRows {
  const float* threshold;  // [rows] of the tile
  const QueryTile& tile;
  int first;  // row of the tile that is the warp's row 0
};

// Calls visit(m, i, row of the warp) for the rows that this thread holds.
template <int kTiles, typename Visit>
__device__ __forceinline__ void for_each_row(const Visit& visit) {
#pragma unroll
  for (int m = 0; m < kTiles; ++m)
#pragma unroll
    for (int i = 0; i < 2; ++i) visit(m, i, 16 * m + 8 * i + static_cast<int>(threadIdx.x) % 32 / 4);
}

// Calls visit(column of the block, m, i, element) for the elements of those rows.
template <int kTiles, typename Visit>
__device__ __forceinline__ void for_each_element(float (&x)[kTiles][kBlock / 8][4], const Visit& visit) {
#pragma unroll
  for (int n = 0; n < kBlock / 8; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e)
#pragma unroll
      for (int m = 0; m < kTiles; ++m)
#pragma unroll
        for (int i = 0; i < 2; ++i) visit(8 * n + static_cast<int>(threadIdx.x) % 4 * 2 + e, m, i, x[m][n][2 * i + e]);
}

// Makes the products of keys that a row does not see -inf, and finds the largest of this thread's columns.
template <GateMode kMode, int kTiles>
__device__ __forceinline__ void mask(float (&x)[kTiles][kBlock / 8][4], const BlockTable& table, const GateRows& rows,
                                     float (&largest)[kTiles][2]) {
  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  float threshold[kTiles][2];
  int32_t position[kTiles][2];
  for_each_row<kTiles>([&](int m, int i, int row) {
    if (kMode != kSolid) threshold[m][i] = rows.threshold[rows.first + row];
    if (kMode == kMasked) position[m][i] = rows.tile.position(rows.first + row);
    largest[m][i] = kLowest;
  });
  for_each_element(x, [&](int column, int m, int i, float& logit) {
    if (kMode != kSolid) {
      bool seen = table.score[column] > threshold[m][i];
      if (kMode == kMasked) seen = seen && static_cast<uint32_t>(position[m][i] - table.from[column]) < table.span;
      logit = seen ? logit : kLowest;
    }
    largest[m][i] = fmaxf(largest[m][i], logit);
  });
}

// Moves the base of rows whose products have outgrown it, and scales their sums. Returns whether any row of the warp
// did, and then the factors.
template <int kTiles>
__device__ __forceinline__ bool move_base(const float (&largest)[kTiles][2], float scale, RowState<kTiles>& state,
                                          float (&factor)[kTiles][2]) {
  bool moves = false;
  for_each_row<kTiles>(
      [&](int m, int i, int) { moves = moves || __fmul_rn(largest[m][i], scale) > state.base[m][i] + kSlack; });
  if (!__any_sync(~0u, moves)) return false;
  for_each_row<kTiles>([&](int m, int i, int) {
    float top = fmaxf(largest[m][i], __shfl_xor_sync(~0u, largest[m][i], 1));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
    const float before = state.base[m][i], logit = __fmul_rn(top, scale);
    const bool mine = logit > before + kSlack;
    state.base[m][i] = mine ? logit : before;
    factor[m][i] = mine ? exp2_fast(before - logit) : 1.0f;
    state.sum[m][i] = __fmul_rn(state.sum[m][i], factor[m][i]);
  });
  return true;
}

// Turns products into weights, and adds them to the sums.
template <bool kGates, int kTiles>
__device__ __forceinline__ void weigh(float (&x)[kTiles][kBlock / 8][4], float scale, const BlockTable& table,
                                      const GateRows& rows, RowState<kTiles>& state) {
  float threshold[kTiles][2], base[kTiles][2];
  for_each_row<kTiles>([&](int m, int i, int row) {
    if (kGates) threshold[m][i] = rows.threshold[rows.first + row];
    // Without a key so far, the weights are 0 relative to anything.
    base[m][i] = state.base[m][i] == -std::numeric_limits<float>::infinity() ? 0.0f : state.base[m][i];
  });
  for_each_element(x, [&](int column, int m, int i, float& element) {
    element = exp2_fast(__fmaf_rn(element, scale, -base[m][i]));
    if (kGates) element = __fmul_rn(__saturatef(table.score[column] - threshold[m][i]), element);
    state.sum[m][i] = __fadd_rn(state.sum[m][i], element);
  });
}

}  // namespace sparsek::cuda::sm80
