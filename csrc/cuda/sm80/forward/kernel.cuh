// Forward on tensor cores: a CTA for each tile of queries gathers the keys and values that the tile sees, in blocks.
//
// Keys and values have a buffer each: while one is multiplied, the other one is on its way. A NaN or an infinity in a
// value would reach rows that do not see it, as 0 * NaN in a matrix product. Looking at the results finds that: the
// tile is then done again without the elements that are not finite, and what they are due is found by products with
// matrices that mark them.
#pragma once

#include <cfloat>
#include <cmath>

#include "cuda/common/elements.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/sm80/forward/launch.h"
#include "cuda/sm80/forward/rows.cuh"
#include "cuda/sm80/forward/softmax.cuh"

namespace sparsek::cuda::sm80 {

enum Pass { kPlain, kFiniteValues, kPositiveValues, kNegativeValues };  // the last two: those that are not finite

template <int kWidth>
struct Shape {
  static constexpr int kRows = kWidth <= 128 ? 128 : 64;       // of a tile
  static constexpr int kTiles = kRows / (kThreads / 32) / 16;  // of 16 rows in a warp
  static constexpr int kRowBytes = kWidth * 2;
};

template <int kWidth>
struct Shared {
  alignas(128) char query[Shape<kWidth>::kRows * Shape<kWidth>::kRowBytes];
  alignas(128) char key[kBlock * Shape<kWidth>::kRowBytes];
  alignas(128) char value[kBlock * Shape<kWidth>::kRowBytes];
  BlockTable table[2];  // of the blocks n and n + 1
  float threshold[Shape<kWidth>::kRows];
  const char* first_key;  // rows of key 0 of the sequence
  const char* first_value;
  QueryTile tile;
  BlockCursor cursor;
};
static_assert(sizeof(Shared<256>) <= 99 * 1024 && sizeof(Shared<192>) <= 99 * 1024, "what every GPU has");

// What a gate of that row is clipped against: +inf sees no key, NaN makes the row NaN.
__device__ inline float row_threshold(const AttentionParams<float>& p, const QueryTile& tile, int32_t run_begin,
                                      int row) {
  if (!tile.exists(row)) return INFINITY;
  const int64_t column = (tile.sequence.batch * p.groups + tile.group) * p.queries;
  const float threshold = p.threshold[column + tile.query(row)];
  if (isnan(threshold)) return threshold;
  if (p.pattern.hard) return p.pattern.causal ? static_cast<float>(tile.position(row) - run_begin) : 0.0f;
  return fminf(threshold, FLT_MAX);  // pinned keys, +inf, keep a gate of 1
}

// Fills in all of the shared memory but for the buffers and the tables.
template <int kWidth>
__device__ void set_tile(const ForwardParams<float>& p, const Plan& plan, const QueryTile& tile,
                         Shared<kWidth>& shared) {
  TileBlocks blocks{};
  if (tile.has_keys()) blocks = find_blocks(p, plan, tile);
  const int last_row = (tile.last - tile.begin) << tile.log_heads;
  for (int row = static_cast<int>(threadIdx.x); row < Shape<kWidth>::kRows; row += kThreads) {
    const float threshold = row_threshold(p, tile, blocks.run.begin, row);
    shared.threshold[row] = threshold;
    if (row == last_row) shared.cursor.threshold = threshold;
  }
  if (threadIdx.x == 0) {
    shared.tile = tile;
    shared.first_key = p.key.row(tile.sequence.batch, tile.sequence.key_begin, tile.group);
    shared.first_value = p.value.row(tile.sequence.batch, tile.sequence.key_begin, tile.group);
    shared.cursor.blocks = blocks;
    shared.cursor.keys = tile.sequence.keys;
  }
}

template <int kTiles, int kColumns>
__device__ __forceinline__ void set_zero(float (&x)[kTiles][kColumns][4]) {
#pragma unroll
  for (int m = 0; m < kTiles; ++m)
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) x[m][n][e] = 0.0f;
}

// x [rows, keys] = query key^T
template <typename T, int kWidth, int kTiles>
__device__ __forceinline__ void multiply_keys(float (&x)[kTiles][kBlock / 8][4], uint32_t query, uint32_t key) {
  const FragmentRows<kWidth> left(query, true), right(key, false);
  set_zero(x);
#pragma unroll
  for (int k = 0; k < kWidth; k += 16) {
    uint32_t a[kTiles][4];
#pragma unroll
    for (int m = 0; m < kTiles; ++m) load_matrices(a[m], left.at(16 * m, k));
#pragma unroll
    for (int n = 0; n < kBlock / 8; n += 2) {
      uint32_t b[4];
      load_matrices(b, right.at(8 * n, k));
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        multiply_add<T>(x[m][n], a[m], b[0], b[1]);
        multiply_add<T>(x[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// out [rows, width] += weights [rows, keys] value
template <typename T, int kWidth, int kTiles>
__device__ __forceinline__ void multiply_values(float (&out)[kTiles][kWidth / 8][4],
                                                const uint32_t (&weights)[kBlock / 16][kTiles][4], uint32_t value) {
  const FragmentRows<kWidth> right(value, true);
#pragma unroll
  for (int k = 0; k < kBlock; k += 16)
#pragma unroll
    for (int n = 0; n < kWidth / 8; n += 2) {
      uint32_t b[4];
      load_matrices_transposed(b, right.at(k, 8 * n));
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        multiply_add<T>(out[m][n], weights[k / 16][m], b[0], b[1]);
        multiply_add<T>(out[m][n + 1], weights[k / 16][m], b[2], b[3]);
      }
    }
}

// Accumulators as the left operands of the next product.
template <typename T, int kTiles>
__device__ __forceinline__ void pack_weights(const float (&x)[kTiles][kBlock / 8][4],
                                             uint32_t (&weights)[kBlock / 16][kTiles][4]) {
#pragma unroll
  for (int k = 0; k < kBlock / 16; ++k)
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        weights[k][m][i] = pack<T>(x[m][2 * k + i / 2][i % 2 * 2], x[m][2 * k + i / 2][i % 2 * 2 + 1]);
}

// What stands for an element of a value in one of the passes.
__device__ inline float stand_in(float x, int pass) {
  if (pass == kFiniteValues) return isfinite(x) ? x : 0.0f;
  return isnan(x) || x == (pass == kPositiveValues ? INFINITY : -INFINITY) ? 1.0f : 0.0f;
}

// Writes two neighbours at an even column of a row of unit stride, which must be aligned to both.
template <typename Stored>
__device__ __forceinline__ void write_pair(char* row, int column, float low, float high) {
  Stored* target = reinterpret_cast<Stored*>(row) + column;
  if constexpr (sizeof(Stored) == 2) {
    *reinterpret_cast<uint32_t*>(target) = pack<Stored>(low, high);
  } else if constexpr (sizeof(Stored) == 4) {
    *reinterpret_cast<float2*>(target) = {low, high};
  } else {
    *reinterpret_cast<double2*>(target) = {low, high};
  }
}

// First row of the tile that this warp holds.
template <int kTiles>
__device__ __forceinline__ int warp_row() {
  return static_cast<int>(threadIdx.x) / 32 * kTiles * 16;
}

template <int kWidth, int kTiles>
__device__ __forceinline__ void store_tile(const ForwardParams<float>& p, const Shared<kWidth>& shared,
                                           const float (&out)[kTiles][kWidth / 8][4], RowState<kTiles>& state) {
  const QueryTile& tile = shared.tile;
  const int column = static_cast<int>(threadIdx.x) % 4 * 2;
  with_stored(p.out.dtype, [&](auto stored) {
    using Stored = typename decltype(stored)::type;
    for_each_row<kTiles>([&](int m, int i, int offset) {
      const int row = warp_row<kTiles>() + offset;
      float sum = state.sum[m][i];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      if (!tile.exists(row)) return;
      float factor = sum == 0.0f ? 0.0f : 1.0f / sum;  // no key: output 0, LSE -inf
      float lse = state.base[m][i] * static_cast<float>(M_LN2) + logf(sum);
      if (isnan(shared.threshold[row])) factor = lse = shared.threshold[row];
      const int64_t batch = tile.sequence.batch, query = tile.query(row), head = tile.query_head(row);
      char* target = p.out.row(batch, query, head);
#pragma unroll
      for (int n = 0; n < kWidth / 8; ++n) {
        if (8 * n < p.out.width)
          write_pair<Stored>(target, 8 * n + column, out[m][n][2 * i] * factor, out[m][n][2 * i + 1] * factor);
      }
      if (column == 0) p.lse[(batch * p.groups * p.heads_per_group + head) * p.queries + query] = lse;
    });
  });
}

// Adds `due` to the outputs whose element of `marks` is positive.
template <int kWidth, int kTiles>
__device__ __forceinline__ void add_where_marked(const ForwardParams<float>& p, const QueryTile& tile,
                                                 const float (&marks)[kTiles][kWidth / 8][4], float due) {
  for_each_row<kTiles>([&](int m, int i, int offset) {
    const int row = warp_row<kTiles>() + offset;
    uint64_t marked = 0;  // bit 2 * n + e: few of them, which a loop goes through
#pragma unroll
    for (int n = 0; n < kWidth / 8; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) marked |= static_cast<uint64_t>(marks[m][n][2 * i + e] > 0.0f) << (2 * n + e);
    if (!tile.exists(row)) return;
    char* target = p.out.row(tile.sequence.batch, tile.query(row), tile.query_head(row));
    with_stored(p.out.dtype, [&](auto stored) {
      using Stored = typename decltype(stored)::type;
      for (; marked != 0; marked &= marked - 1) {
        const int bit = __ffsll(static_cast<int64_t>(marked)) - 1;
        const int column = bit / 2 * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + bit % 2;
        if (column < p.out.width) write<Stored>(target, column, read<float, Stored>(target, column) + due);
      }
    });
  });
}

template <int kWidth, int kTiles>
__device__ __forceinline__ bool is_finite(const float (&out)[kTiles][kWidth / 8][4], const RowState<kTiles>& state) {
  float zero[kTiles][2];  // or NaN
  for_each_row<kTiles>([&](int m, int i, int) {
    zero[m][i] = 0.0f * state.sum[m][i];
#pragma unroll
    for (int n = 0; n < kWidth / 8; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) zero[m][i] = __fmaf_rn(0.0f, out[m][n][2 * i + e], zero[m][i]);
  });
  bool finite = true;
  for_each_row<kTiles>([&](int m, int i, int) { finite = finite && zero[m][i] == 0.0f; });
  return finite;
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads, 2)
    attend(const __grid_constant__ ForwardParams<float> p, const __grid_constant__ Plan plan, Items tiles,
           uint32_t num_tiles, int log_heads) {
  using S = Shape<kWidth>;
  constexpr int kTiles = S::kTiles;
  Shared<kWidth>& shared = shared_memory<Shared<kWidth>>();
  const int warp = static_cast<int>(threadIdx.x) / 32;
  // The tiles of a head are neighbours, which share its keys in the L2 cache; the later ones have more of them.
  const uint32_t pack = blockIdx.x / num_tiles, item = num_tiles - 1 - blockIdx.x % num_tiles;
  const QueryTile tile = find_query_tile(p, tiles, item, int64_t{pack} << log_heads, 1 << log_heads);
  if (tile.last < tile.first) return;

  copy_rows_async<S::kRows, kWidth>(shared_address(shared.query), p.query.width, [&](int row) {
    const bool exists = tile.exists(row);
    const int64_t query = exists ? tile.query(row) : tile.sequence.query_begin;
    return SourceRow{p.query.row(tile.sequence.batch, query, tile.query_head(row)), exists};
  });
  commit_copies();
  set_tile(p, plan, tile, shared);
  // A negative scale is a positive one of negated queries, so that the largest product has the largest logit.
  const float magnitude = static_cast<float>(fabs(p.scale) * M_LOG2E);
  const float sign = magnitude == 0.0f ? 0.0f : p.scale < 0.0 ? -1.0f : 1.0f;
  const float scale = magnitude == 0.0f ? 1.0f : magnitude;
  if (sign != 1.0f) {
    wait_copies<0>();
    replace_elements<T, S::kRows, kWidth>(shared.query, [&](float x) { return sign * x; });
  }

  const auto gather = [&](char* buffer, const Rows& rows, const char* first, const BlockTable& table) {
    if (table.mode == kNoBlock) return;
    const uint64_t stride = rows.stride[1] * sizeof(T);
    copy_rows_async<kBlock, kWidth>(shared_address(buffer), rows.width, [&](int row) {
      return SourceRow{first + static_cast<uint32_t>(table.key[row]) * stride, true};
    });
    commit_copies();
  };
  const GateRows rows{shared.threshold, shared.tile, warp_row<kTiles>()};
  const uint32_t query = shared_address(shared.query) + warp_row<kTiles>() * S::kRowBytes;

  for (int pass = kPlain;; ++pass) {
    float out[kTiles][kWidth / 8][4] = {};
    RowState<kTiles> state;
    for_each_row<kTiles>([&](int m, int i, int) {
      state.base[m][i] = -INFINITY;
      state.sum[m][i] = 0.0f;
    });
    __syncthreads();
    if (warp == 0) rewind(shared.cursor, shared.table);
    __syncthreads();
    gather(shared.key, p.key, shared.first_key, shared.table[0]);

    for (int n = 0;; ++n) {
      BlockTable& table = shared.table[n % 2];
      wait_copies<0>();
      __syncthreads();
      const GateMode mode = table.mode;
      if (mode == kNoBlock) break;
      gather(shared.value, p.value, shared.first_value, table);
      BlockSlots ahead{};
      if (warp == 0) ahead = load_next_block(shared.cursor);

      float x[kTiles][kBlock / 8][4];
      if (pass <= kFiniteValues) {
        multiply_keys<T, kWidth>(x, query, shared_address(shared.key));
      } else {
        set_zero(x);
      }
      float largest[kTiles][2], factor[kTiles][2];
      if (mode == kSolid) {
        mask<kSolid>(x, table, rows, largest);
      } else if (mode == kGated) {
        mask<kGated>(x, table, rows, largest);
      } else {
        mask<kMasked>(x, table, rows, largest);
      }
      if (move_base(largest, scale, state, factor)) {
#pragma unroll
        for (int m = 0; m < kTiles; ++m)
#pragma unroll
          for (int j = 0; j < kWidth / 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) out[m][j][e] *= factor[m][e / 2];
      }
      if (mode == kSolid) {
        weigh<false>(x, scale, table, rows, state);
      } else {
        weigh<true>(x, scale, table, rows, state);
      }
      uint32_t weights[kBlock / 16][kTiles][4];
      pack_weights<T>(x, weights);

      wait_copies<0>();
      if (pass != kPlain) replace_elements<T, kBlock, kWidth>(shared.value, [&](float v) { return stand_in(v, pass); });
      __syncthreads();
      gather(shared.key, p.key, shared.first_key, shared.table[(n + 1) % 2]);
      if (warp == 0) store_block(table, ahead, shared.cursor.blocks.window);
      multiply_values<T, kWidth>(out, weights, shared_address(shared.value));
    }

    if (__syncthreads_or(pass == kPlain && !is_finite<kWidth>(out, state))) continue;
    if (pass <= kFiniteValues) {
      store_tile(p, shared, out, state);
    } else {
      add_where_marked<kWidth>(p, shared.tile, out, pass == kPositiveValues ? INFINITY : -INFINITY);
    }
    if (pass == kPlain || pass == kNegativeValues) break;
  }
}

template <typename T, int kWidth>
void launch_forward(const ForwardParams<float>& params, const Plan& plan, cudaStream_t stream) {
  const Sequences& sequences = params.sequences;
  if (sequences.count == 0) return;
  int log_heads = 0;  // the heads of a group share what a tile gathers
  while (log_heads < 4 && params.heads_per_group % (int64_t{2} << log_heads) == 0) ++log_heads;
  const Items tiles = query_tiles(Shape<kWidth>::kRows, 1 << log_heads);
  const int64_t num_tiles = sequences.num_items(sequences.cu_q, params.queries, tiles);
  const int64_t packs = params.groups * params.heads_per_group >> log_heads;
  launch("attend", attend<T, kWidth>, packs * num_tiles, kThreads, sizeof(Shared<kWidth>), stream, params, plan, tiles,
         num_tiles, log_heads);
}

}  // namespace sparsek::cuda::sm80
