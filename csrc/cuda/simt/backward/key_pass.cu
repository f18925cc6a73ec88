// Gradients of the keys and values: a CTA for each tile of keys of one group of heads, and each slice of their
// gradients, goes through the tiles of queries that see any of these keys, for all heads of the group.
#include "cuda/common/launch.cuh"
#include "cuda/simt/backward/passes.h"
#include "cuda/simt/backward/softmax.cuh"
#include "cuda/simt/tile.cuh"

namespace sparsek::cuda::simt {
namespace {

// Queries of the sequence that may see a key of the tile.
struct QueryRange {
  int64_t begin, end;
};

template <typename T>
__device__ QueryRange find_queries(const Columns<T>& columns, const Sequence& sequence, bool causal) {
  int32_t first = kNever, last = 0;
  for (int c = 0; c < kTile; ++c) {
    if (columns.expiry[c] <= columns.seen_from[c]) continue;
    first = min(first, columns.seen_from[c]);
    last = max(last, columns.expiry[c]);
  }
  if (first >= last) return {0, 0};
  if (!causal) return {0, sequence.queries};
  const int64_t shift = sequence.shift();
  return {max(first - shift, int64_t{0}), min(last - shift, static_cast<int64_t>(sequence.queries))};
}

template <typename T>
__global__ void __launch_bounds__(kThreads) differentiate_keys(const __grid_constant__ BackwardParams<T> p) {
  Shared<T>& shared = shared_memory<Shared<T>>();
  const int64_t slices = num_slices<T>(max(p.query.width, p.value.width));
  const int64_t slice = blockIdx.x % slices, group = blockIdx.x / slices % p.groups;
  const int64_t item = blockIdx.x / slices / p.groups;
  const Sequences& sequences = p.sequences;
  const int64_t s = sequences.find(sequences.cu_k, p.keys, kTiles, item);
  const Sequence sequence = sequences.at(s);
  const int64_t begin = (item - sequences.first_item(sequences.cu_k, p.keys, kTiles, s)) * kTile;
  if (begin < 0 || begin >= sequence.keys) return;
  const int64_t first_key = (sequence.batch * p.groups + group) * p.keys + sequence.key_begin;
  if (threadIdx.x < kTile) {
    const int64_t place = begin + threadIdx.x;
    const int32_t key = place < sequence.keys ? p.order[first_key + place] : -1;
    // Sequences that overlap, as none should, overwrite each other's order.
    shared.columns.set(threadIdx.x, key < sequence.keys ? key : -1, p.pattern, p.expiry + first_key,
                       p.scores + first_key);
  }
  __syncthreads();
  const auto key_row = [&](int c) {
    return shared.columns.key[c] < 0 ? int64_t{-1} : sequence.key_begin + shared.columns.key[c];
  };
  const TileRows key{p.key, sequence.batch, group, key_row}, value{p.value, sequence.batch, group, key_row};
  const int64_t element = slice * kSlice<T>;
  const bool has_key = element < p.query.width, has_value = element < p.value.width;

  T grad_key[4][kColumns<T>] = {}, grad_value[4][kColumns<T>] = {};
  double gate_sums[4] = {};  // of the thread's columns, over its rows
  const QueryRange range = find_queries(shared.columns, sequence, p.pattern.causal);
  for (int64_t start = range.begin / kTile * kTile; start < range.end; start += kTile) {
    const QueryTile tile = make_query_tile(sequence, start, p.pattern.causal);
    const auto query_row = [&](int r) { return tile.row(r); };
    const auto sees = [&](int r, int c) { return shared.columns.sees(tile.position(r), c); };
    for (int64_t head = group * p.heads_per_group; head < (group + 1) * p.heads_per_group; ++head) {
      const TileRows query{p.query, sequence.batch, head, query_row};
      const TileRows grad_out{p.grad_out, sequence.batch, head, query_row};
      T logits[4][4], grad_weights[4][4];
      multiply(shared, query, static_cast<T>(p.scale), key, logits);
      multiply(shared, grad_out, T(1), value, grad_weights);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const RowState<T> row = load_row_state(p, tile, head, 4 * thread_row() + r);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const Derivative<T> derivative = differentiate(shared.columns, 4 * thread_column() + c, row, p.pattern.hard,
                                                         logits[r][c], grad_weights[r][c]);
          shared.weights[4 * thread_row() + r][4 * thread_column() + c] = derivative.weight;
          logits[r][c] = derivative.grad_logit;
          gate_sums[c] += derivative.grad_gate;
        }
      }
      if (has_value) add_weighted(shared, grad_out, element, T(1), sees, grad_value);
      if (!has_key) continue;
      __syncthreads();  // the weights are done with
#pragma unroll
      for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int c = 0; c < 4; ++c) shared.weights[4 * thread_row() + r][4 * thread_column() + c] = logits[r][c];
      add_weighted(shared, query, element, static_cast<T>(p.scale), sees, grad_key);
    }
  }

  const auto one = [](int) { return T(1); };
  store(TileRows{p.grad_key, sequence.batch, group, key_row}, element, one, grad_key);
  store(TileRows{p.grad_value, sequence.batch, group, key_row}, element, one, grad_value);
  if (slice != 0) return;
  double (*sums)[kTile] = reinterpret_cast<double (*)[kTile]>(shared.weights);  // [kSide, kTile]
  __syncthreads();
  for (int c = 0; c < 4; ++c) sums[thread_row()][4 * thread_column() + c] = gate_sums[c];
  __syncthreads();
  if (threadIdx.x >= kTile || shared.columns.key[threadIdx.x] < 0) return;
  double sum = 0;
  for (int i = 0; i < kSide; ++i) sum += sums[i][threadIdx.x];
  p.key_sums[first_key + shared.columns.key[threadIdx.x]] = sum;
}

}  // namespace

template <typename T>
void run_key_pass(const BackwardParams<T>& params, cudaStream_t stream) {
  const Sequences& sequences = params.sequences;
  const int64_t tiles = sequences.count == 0 ? 0 : sequences.num_items(sequences.cu_k, params.keys, kTiles);
  const int64_t width = params.query.width > params.value.width ? params.query.width : params.value.width;
  const int64_t slices = (width + kSlice<T> - 1) / kSlice<T>;
  launch("differentiate_keys", differentiate_keys<T>, tiles * params.groups * slices, kThreads, sizeof(Shared<T>),
         stream, params);
}

template void run_key_pass(const BackwardParams<float>&, cudaStream_t);
template void run_key_pass(const BackwardParams<double>&, cudaStream_t);

}  // namespace sparsek::cuda::simt
