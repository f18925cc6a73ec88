// Gradients of the queries: a CTA for each tile of queries of one group of heads, and each slice of their gradient,
// goes through the keys that the tile sees, for one head after the other.
#include "cuda/common/launch.cuh"
#include "cuda/simt/backward/passes.h"
#include "cuda/simt/backward/softmax.cuh"
#include "cuda/simt/key_scan.cuh"
#include "cuda/simt/tile.cuh"

namespace sparsek::cuda::simt {
namespace {

template <typename T>
struct QueryPassShared {
  Shared<T> tile;
  KeyScan::Memory keys;
};

template <typename T>
__global__ void __launch_bounds__(kThreads) differentiate_queries(const __grid_constant__ BackwardParams<T> p) {
  QueryPassShared<T>& memory = shared_memory<QueryPassShared<T>>();
  Shared<T>& shared = memory.tile;
  const int64_t slices = num_slices<T>(p.query.width);
  const int64_t slice = blockIdx.x % slices, group = blockIdx.x / slices % p.groups;
  const QueryTile tile = find_query_tile(p, blockIdx.x / slices / p.groups);
  if (tile.count == 0) return;
  const Sequence& sequence = tile.sequence;
  const int64_t first_key = (sequence.batch * p.groups + group) * p.keys + sequence.key_begin;
  const auto query_row = [&](int r) { return tile.row(r); };
  const auto key_row = [&](int c) {
    return shared.columns.key[c] < 0 ? int64_t{-1} : sequence.key_begin + shared.columns.key[c];
  };
  const auto sees = [&](int c, int r) { return shared.columns.sees(tile.position(r), c); };
  const TileRows key{p.key, sequence.batch, group, key_row}, value{p.value, sequence.batch, group, key_row};

  double gate_sums[4] = {};  // of the thread's columns, over all heads
  for (int64_t head = group * p.heads_per_group; head < (group + 1) * p.heads_per_group; ++head) {
    const TileRows query{p.query, sequence.batch, head, query_row};
    const TileRows grad_out{p.grad_out, sequence.batch, head, query_row};
    RowState<T> rows[4];
    T grad_query[4][kColumns<T>];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      rows[r] = load_row_state(p, tile, head, 4 * thread_row() + r);
#pragma unroll
      for (int c = 0; c < kColumns<T>; ++c) grad_query[r][c] = poison(rows[r].threshold);
    }
    KeyScan scan(memory.keys, tile, p.expiry + first_key, p.pattern.causal);
    while (scan.next()) {
      __syncthreads();  // the keys before are done with
      if (threadIdx.x < kTile)
        shared.columns.set(threadIdx.x, scan.key(threadIdx.x), p.pattern, p.expiry + first_key, p.scores + first_key);
      T logits[4][4], grad_weights[4][4];
      multiply(shared, query, static_cast<T>(p.scale), key, logits);
      multiply(shared, grad_out, T(1), value, grad_weights);
#pragma unroll
      for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const Derivative<T> derivative = differentiate(shared.columns, 4 * thread_column() + c, rows[r],
                                                         p.pattern.hard, logits[r][c], grad_weights[r][c]);
          shared.weights[4 * thread_column() + c][4 * thread_row() + r] = derivative.grad_logit;
          gate_sums[r] += derivative.grad_gate;
        }
      add_weighted(shared, key, slice * kSlice<T>, T(1), sees, grad_query);
    }
    const auto scale = [&](int) { return static_cast<T>(p.scale); };
    store(TileRows{p.grad_query, sequence.batch, head, query_row}, slice * kSlice<T>, scale, grad_query);
    __syncthreads();  // the list of keys begins anew
  }

#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const double sum = sum_over_row(gate_sums[r]);
    const int64_t row = tile.row(4 * thread_row() + r);
    if (slice == 0 && thread_column() == 0 && row >= 0)
      p.query_sums[(sequence.batch * p.groups + group) * p.queries + row] = sum;
  }
}

}  // namespace

template <typename T>
void run_query_pass(const BackwardParams<T>& params, cudaStream_t stream) {
  const int64_t slices = (params.query.width + kSlice<T> - 1) / kSlice<T>;
  launch("differentiate_queries", differentiate_queries<T>, num_query_tiles(params) * params.groups * slices, kThreads,
         sizeof(QueryPassShared<T>), stream, params);
}

template void run_query_pass(const BackwardParams<float>&, cudaStream_t);
template void run_query_pass(const BackwardParams<double>&, cudaStream_t);

}  // namespace sparsek::cuda::simt
