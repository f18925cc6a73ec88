// Forward without tensor cores: a CTA for each tile of queries of one head, and each slice of its output, goes through
// the keys that the tile sees with an online softmax.
#include <limits>

#include "cuda/common/launch.cuh"
#include "cuda/forward/params.h"
#include "cuda/simt/key_scan.cuh"
#include "cuda/simt/tile.cuh"

namespace sparsek::cuda {
namespace simt {
namespace {

template <typename T>
struct ForwardShared {
  Shared<T> tile;
  KeyScan::Memory keys;
};

// One row of the online softmax, the same for the threads that share it.
template <typename T>
struct RowState {
  int32_t position;
  T threshold;
  T maximum;
  T sum;
};

// Turns logits into weights relative to the largest logit so far, 0 where the key is not seen. Returns by what sums of
// before must be multiplied.
template <typename T>
__device__ T weigh(const Columns<T>& columns, bool hard, RowState<T>& row, T (&logits)[4]) {
  const T lowest = -std::numeric_limits<T>::infinity();
  bool seen[4];
  T maximum = lowest;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    seen[c] = columns.sees(row.position, 4 * thread_column() + c);
    maximum = fmax(maximum, seen[c] ? logits[c] : lowest);
  }
  const T before = row.maximum;
  row.maximum = fmax(before, max_over_row(maximum));
  T sum = 0;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const int column = 4 * thread_column() + c;
    const T above = columns.score[column] - row.threshold;
    const T gate = !hard && columns.gated(row.position, column) && above < T(1) ? above : T(1);
    logits[c] = seen[c] ? gate * exp(logits[c] - row.maximum) : T(0);
    sum += logits[c];
  }
  const T decay = row.maximum == before ? T(1) : exp(before - row.maximum);
  row.sum = row.sum * decay + sum_over_row(sum);
  return decay;
}

// Two CTAs to a multiprocessor hide each other's waiting; registers for float64 leave room for one.
template <typename T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 2) attend(const __grid_constant__ ForwardParams<T> p) {
  ForwardShared<T>& memory = shared_memory<ForwardShared<T>>();
  Shared<T>& shared = memory.tile;
  const int64_t slices = num_slices<T>(p.value.width), heads = p.groups * p.heads_per_group;
  const int64_t slice = blockIdx.x % slices, head = blockIdx.x / slices % heads, group = head / p.heads_per_group;
  const QueryTile tile = find_query_tile(p, blockIdx.x / slices / heads);
  if (tile.count == 0) return;
  const Sequence& sequence = tile.sequence;
  const int64_t first_key = (sequence.batch * p.groups + group) * p.keys + sequence.key_begin;
  const T* threshold = p.threshold + (sequence.batch * p.groups + group) * p.queries;
  const auto query_row = [&](int r) { return tile.row(r); };
  const auto key_row = [&](int c) {
    return shared.columns.key[c] < 0 ? int64_t{-1} : sequence.key_begin + shared.columns.key[c];
  };
  const TileRows query{p.query, sequence.batch, head, query_row};
  const TileRows key{p.key, sequence.batch, group, key_row}, value{p.value, sequence.batch, group, key_row};

  RowState<T> rows[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int64_t row = tile.row(4 * thread_row() + r);
    const T mine = row < 0 ? T(0) : threshold[row];
    rows[r] = {tile.position(4 * thread_row() + r), mine, -std::numeric_limits<T>::infinity(), poison(mine)};
  }
  T out[4][kColumns<T>] = {};
  const auto sees = [&](int c, int r) { return shared.columns.sees(tile.position(r), c); };
  KeyScan scan(memory.keys, tile, p.expiry + first_key, p.pattern.causal);
  while (scan.next()) {
    __syncthreads();  // the keys before are done with
    if (threadIdx.x < kTile)
      shared.columns.set(threadIdx.x, scan.key(threadIdx.x), p.pattern, p.expiry + first_key, p.scores + first_key);
    T logits[4][4];
    multiply(shared, query, static_cast<T>(p.scale), key, logits);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const T decay = weigh(shared.columns, p.pattern.hard, rows[r], logits[r]);
#pragma unroll
      for (int c = 0; c < kColumns<T>; ++c) out[r][c] *= decay;
#pragma unroll
      for (int c = 0; c < 4; ++c) shared.weights[4 * thread_column() + c][4 * thread_row() + r] = logits[r][c];
    }
    add_weighted(shared, value, slice * kSlice<T>, T(1), sees, out);
  }

  const auto factor = [&](int r) { return rows[r].sum == T(0) ? T(0) : T(1) / rows[r].sum; };  // no key: output 0
  store(TileRows{p.out, sequence.batch, head, query_row}, slice * kSlice<T>, factor, out);
  if (slice != 0 || thread_column() != 0) return;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int64_t row = tile.row(4 * thread_row() + r);
    if (row >= 0) p.lse[(sequence.batch * heads + head) * p.queries + row] = rows[r].maximum + log(rows[r].sum);
  }
}

}  // namespace
}  // namespace simt

template <typename T>
void run_forward_simt(const ForwardParams<T>& params, cudaStream_t stream) {
  const int64_t slices = (params.value.width + simt::kSlice<T> - 1) / simt::kSlice<T>;
  const int64_t ctas = simt::num_query_tiles(params) * params.groups * params.heads_per_group * slices;
  launch("attend", simt::attend<T>, ctas, simt::kThreads, sizeof(simt::ForwardShared<T>), stream, params);
}

template void run_forward_simt(const ForwardParams<float>&, cudaStream_t);
template void run_forward_simt(const ForwardParams<double>&, cudaStream_t);

}  // namespace sparsek::cuda
