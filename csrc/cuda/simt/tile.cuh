// Products of tiles without tensor cores: CTAs of 16 x 16 threads, each of them holding 4 x 4 elements of a tile of
// logits, or 4 rows of a slice of an output.
#pragma once

#include "cuda/common/elements.cuh"
#include "cuda/common/params.h"

namespace sparsek::cuda::simt {

constexpr int kThreads = 256;
constexpr int kSide = 16;            // threads in each direction
constexpr int kTile = 64;            // queries and keys of a tile
constexpr int kChunk = 32;           // terms of a product that are in shared memory at a time
constexpr int kPitch = kTile + 4;    // 16-byte alignment, fewer bank conflicts
constexpr unsigned kAllLanes = ~0u;  // of a warp

// Elements of an output row that a CTA computes. Wider rows are shared among several CTAs, which all compute the
// logits.
template <typename T>
constexpr int kSlice = sizeof(T) == 8 ? 64 : 128;
template <typename T>
constexpr int kColumns = kSlice<T> / kSide;  // of one thread

template <typename T>
__device__ int64_t num_slices(int64_t width) {
  return (width + kSlice<T> - 1) / kSlice<T>;
}

__device__ inline int thread_row() { return static_cast<int>(threadIdx.x) / kSide; }
__device__ inline int thread_column() { return static_cast<int>(threadIdx.x) % kSide; }

// Which element of its slice a thread's column c is.
__device__ inline int slice_column(int c) { return c / 4 * kTile + 4 * thread_column() + c % 4; }

template <typename T>
struct alignas(16) Four {
  T x[4];
};

template <typename T>
__device__ __forceinline__ Four<T> load_four(const T* aligned) {
  return *reinterpret_cast<const Four<T>*>(aligned);
}

// The keys of a tile, and what decides whether a query at position p sees one, with which gate. Positions of a call
// that is not causal are 0.
template <typename T>
struct Columns {
  int32_t key[kTile];         // of the sequence, or -1
  int32_t seen_from[kTile];   // p >= seen_from[c] and
  int32_t expiry[kTile];      // p < expiry[c]: seen
  int32_t gated_from[kTile];  // p >= gated_from[c]: gated by its score, with gate 1 before
  T score[kTile];

  __device__ bool sees(int32_t position, int c) const { return seen_from[c] <= position && position < expiry[c]; }
  __device__ bool gated(int32_t position, int c) const { return position >= gated_from[c]; }

  // Column c is `new_key`; expiries and scores are those of its sequence.
  __device__ void set(int c, int32_t new_key, const Pattern& pattern, const int32_t* expiries, const T* scores) {
    key[c] = new_key;
    if (new_key < 0) {
      seen_from[c] = kNever;
      expiry[c] = gated_from[c] = 0;
      score[c] = 0;
      return;
    }
    const int64_t gated_at = pattern.causal ? new_key + pattern.window : 0;
    seen_from[c] = pattern.causal ? new_key : 0;
    gated_from[c] = static_cast<int32_t>(gated_at < kNever ? gated_at : kNever);
    expiry[c] = expiries[new_key];
    score[c] = scores[new_key];
  }
};

template <typename T>
struct Shared {
  union {
    struct {
      T left[kChunk][kPitch];  // [term, row]
      T right[kChunk][kPitch];
    } chunk;
    T panel[kChunk][kSlice<T>];  // [row, element]
  };
  T weights[kTile][kPitch];
  Columns<T> columns;
};

// Up to kTile consecutive queries of a sequence.
struct QueryTile {
  Sequence sequence;
  int32_t begin;  // of the sequence's queries
  int32_t count;  // none if not positive
  int32_t first;  // position of the first one
  int32_t step;   // positions from one query to the next

  // -1, which sees nothing, past the last.
  __device__ int32_t position(int r) const { return r < count ? first + step * r : -1; }
  // Row of the batch entry, or -1.
  __device__ int64_t row(int r) const { return r < count ? sequence.query_begin + begin + r : -1; }
};

__device__ inline QueryTile make_query_tile(const Sequence& sequence, int64_t begin, bool causal) {
  const int64_t left = sequence.queries - begin;
  const int32_t count = begin < 0 || left < 0 ? 0 : static_cast<int32_t>(left < kTile ? left : kTile);
  const int32_t start = static_cast<int32_t>(count > 0 ? begin : 0);
  return {sequence, start, count, causal ? start + sequence.shift() : 0, causal ? 1 : 0};
}

constexpr Items kTiles{kTile, 1};

template <typename T>
int64_t num_query_tiles(const AttentionParams<T>& p) {
  return p.sequences.count == 0 ? 0 : p.sequences.num_items(p.sequences.cu_q, p.queries, kTiles);
}

// The last tile comes first: it has the most keys.
template <typename T>
__device__ QueryTile find_query_tile(const AttentionParams<T>& p, int64_t index) {
  const Sequences& sequences = p.sequences;
  const int64_t item = sequences.num_items(sequences.cu_q, p.queries, kTiles) - 1 - index;
  const int64_t s = sequences.find(sequences.cu_q, p.queries, kTiles, item);
  const int64_t begin = (item - sequences.first_item(sequences.cu_q, p.queries, kTiles, s)) * kTile;
  return make_query_tile(sequences.at(s), begin, p.pattern.causal);
}

// out[d, r] = factor * element begin + d of row_of(r); 0 past the width and where row_of(r) < 0.
template <typename T, typename RowOf>
__device__ __forceinline__ void load_chunk(const Rows& rows, int64_t batch, int64_t head, const RowOf& row_of,
                                           int64_t begin, T factor, T (*out)[kPitch]) {
  constexpr int kStep = kThreads / kChunk;
  const int d = static_cast<int>(threadIdx.x) % kChunk, first = static_cast<int>(threadIdx.x) / kChunk;
  const int64_t offset = (begin + d) * rows.stride[3];
  const bool inside = begin + d < rows.width;
  T x[kTile / kStep];
  with_stored(rows.dtype, [&](auto stored) {
#pragma unroll
    for (int i = 0; i < kTile / kStep; ++i) {
      const int64_t row = row_of(first + i * kStep);
      x[i] = inside && row >= 0 ? read<T, typename decltype(stored)::type>(rows.row(batch, row, head), offset) : T(0);
    }
  });
#pragma unroll
  for (int i = 0; i < kTile / kStep; ++i) out[d][first + i * kStep] = x[i] * factor;
}

// A row of a tensor [B, rows, heads, width] for each row of a tile.
template <typename RowOf>
struct TileRows {
  const Rows& rows;
  int64_t batch;
  int64_t head;
  const RowOf& row_of;  // row of the batch entry, or -1
};
template <typename RowOf>
TileRows(const Rows&, int64_t, int64_t, const RowOf&) -> TileRows<RowOf>;

// products[r][c] = factor * row 4 * thread_row() + r of `left` . row 4 * thread_column() + c of `right`. Sums in the
// order of the elements; waits for the CTA before it touches shared memory.
template <typename T, typename LeftRow, typename RightRow>
__device__ __forceinline__ void multiply(Shared<T>& shared, const TileRows<LeftRow>& left, T factor,
                                         const TileRows<RightRow>& right, T (&products)[4][4]) {
#pragma unroll
  for (int r = 0; r < 4; ++r)
#pragma unroll
    for (int c = 0; c < 4; ++c) products[r][c] = 0;
  for (int64_t begin = 0; begin < left.rows.width; begin += kChunk) {
    __syncthreads();
    load_chunk(left.rows, left.batch, left.head, left.row_of, begin, factor, shared.chunk.left);
    load_chunk(right.rows, right.batch, right.head, right.row_of, begin, T(1), shared.chunk.right);
    __syncthreads();
    const int64_t terms = left.rows.width - begin < kChunk ? left.rows.width - begin : kChunk;
#pragma unroll 8
    for (int d = 0; d < terms; ++d) {
      const Four<T> x = load_four(&shared.chunk.left[d][4 * thread_row()]);
      const Four<T> y = load_four(&shared.chunk.right[d][4 * thread_column()]);
#pragma unroll
      for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int c = 0; c < 4; ++c) products[r][c] = fma(x.x[r], y.x[c], products[r][c]);
    }
  }
}

// Loads elements [begin, begin + kSlice) of rows [first, first + kChunk), times factor, into the panel. Returns whether
// all elements that this thread loaded are finite.
template <typename T, typename RowOf>
__device__ __forceinline__ bool load_panel(Shared<T>& shared, const TileRows<RowOf>& source, int first, int64_t begin,
                                           T factor) {
  constexpr int kStep = kThreads / kSlice<T>;
  const Rows& rows = source.rows;
  const int d = static_cast<int>(threadIdx.x) % kSlice<T>, start = static_cast<int>(threadIdx.x) / kSlice<T>;
  const int64_t offset = (begin + d) * rows.stride[3];
  const bool inside = begin + d < rows.width;
  T x[kChunk / kStep];
  with_stored(rows.dtype, [&](auto stored) {
#pragma unroll
    for (int i = 0; i < kChunk / kStep; ++i) {
      const int64_t row = source.row_of(first + start + i * kStep);
      x[i] = inside && row >= 0
                 ? read<T, typename decltype(stored)::type>(rows.row(source.batch, row, source.head), offset)
                 : T(0);
    }
  });
  bool finite = true;
#pragma unroll
  for (int i = 0; i < kChunk / kStep; ++i) {
    const T scaled = x[i] * factor;
    finite = finite && isfinite(scaled);
    shared.panel[start + i * kStep][d] = scaled;
  }
  return finite;
}

// sums[r][c] += sum over i of weights[i][4 * thread_row() + r] * element begin + slice_column(c) of row i of `source`,
// times factor. Weights are 0 where sees(i, row) is false; there, rows that are not finite do not count. Waits for the
// CTA before it reads the weights.
template <typename T, typename RowOf, typename Sees>
__device__ __forceinline__ void add_weighted(Shared<T>& shared, const TileRows<RowOf>& source, int64_t begin, T factor,
                                             const Sees& sees, T (&sums)[4][kColumns<T>]) {
  for (int first = 0; first < kTile; first += kChunk) {
    __syncthreads();
    const bool mine_finite = load_panel(shared, source, first, begin, factor);
    const bool finite = __syncthreads_and(mine_finite);
#pragma unroll
    for (int part = 0; part < kColumns<T>; part += 4) {
      if (begin + part / 4 * kTile >= source.rows.width) break;
      if (finite) {
#pragma unroll 4
        for (int i = 0; i < kChunk; ++i) {
          const Four<T> weight = load_four(&shared.weights[first + i][4 * thread_row()]);
          const Four<T> x = load_four(&shared.panel[i][slice_column(part)]);
#pragma unroll
          for (int r = 0; r < 4; ++r)
#pragma unroll
            for (int c = 0; c < 4; ++c) sums[r][part + c] = fma(weight.x[r], x.x[c], sums[r][part + c]);
        }
      } else {
        for (int i = 0; i < kChunk; ++i) {
          const Four<T> weight = load_four(&shared.weights[first + i][4 * thread_row()]);
          const Four<T> x = load_four(&shared.panel[i][slice_column(part)]);
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            if (!sees(first + i, 4 * thread_row() + r)) continue;
#pragma unroll
            for (int c = 0; c < 4; ++c) sums[r][part + c] = fma(weight.x[r], x.x[c], sums[r][part + c]);
          }
        }
      }
    }
  }
}

// Writes sums[r][...] * factor_of(r) to row 4 * thread_row() + r of the tile.
template <typename T, typename RowOf, typename FactorOf>
__device__ __forceinline__ void store(const TileRows<RowOf>& target, int64_t begin, const FactorOf& factor_of,
                                      const T (&sums)[4][kColumns<T>]) {
  const Rows& rows = target.rows;
  with_stored(rows.dtype, [&](auto stored) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int64_t row = target.row_of(4 * thread_row() + r);
      if (row < 0) continue;
      char* data = rows.row(target.batch, row, target.head);
      const T factor = factor_of(r);
#pragma unroll
      for (int c = 0; c < kColumns<T>; ++c) {
        const int64_t element = begin + slice_column(c);
        if (element < rows.width)
          write<typename decltype(stored)::type>(data, element * rows.stride[3], sums[r][c] * factor);
      }
    }
  });
}

// The sum over the threads of a row, for all of them; the order of the terms does not depend on the thread.
template <typename T>
__device__ T sum_over_row(T x) {
#pragma unroll
  for (int offset = kSide / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

template <typename T>
__device__ T max_over_row(T x) {
#pragma unroll
  for (int offset = kSide / 2; offset > 0; offset /= 2) x = fmax(x, __shfl_xor_sync(kAllLanes, x, offset));
  return x;
}

// NaN for a NaN threshold, which makes all results of a query NaN, and 0 for others.
template <typename T>
__device__ T poison(T threshold) {
  return isnan(threshold) ? threshold : T(0);
}

}  // namespace sparsek::cuda::simt
