// The gradient of the scores: the Jacobian of SparseK, I - 11^T / |F| on the fractional set F, applied to the gradient
// of the gates and summed over the queries. The second term is the same for all keys of F, and a key is in F for one
// interval of queries: its sum over them is a difference of two prefix sums. Those are taken in tiles of the sequence:
// first each tile's total, then, from the totals before it, its prefixes; always in the same order.
#include "cuda/backward/params.h"
#include "cuda/common/elements.cuh"
#include "cuda/common/launch.cuh"

namespace sparsek::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kPerThread = 4;
constexpr Items kKeyTiles{kThreads, 1};
constexpr Items kQueryTiles{kThreads * kPerThread, 1};

// Terms that are not finite are counted instead of summed, so that they reach the intervals that hold them and no
// other.
struct Total {
  double sum;
  int32_t bad;
};

struct Workspace {
  int32_t* begin;         // [B, G, Mk]: each key is fractional for queries [begin, end) of its sequence
  int32_t* end;           // [B, G, Mk]
  int32_t* count;         // [B, G, Mq]: changes of |F| from query to query, then running counts of bad terms
  int32_t* count_totals;  // [query tiles, G]
  Total* term_totals;     // [query tiles, G]
};

// A tile of the rows of one sequence, for one group.
struct Tile {
  Sequence sequence;
  int64_t group;
  int64_t begin;       // of the sequence's rows
  int64_t item;        // among all tiles
  int64_t first_item;  // of the sequence
};

template <typename T>
__device__ Tile find_tile(const BackwardParams<T>& p, const int32_t* cu, int64_t rows, Items tiles) {
  const int64_t item = blockIdx.x / p.groups, group = blockIdx.x % p.groups;
  const int64_t s = p.sequences.find(cu, rows, tiles, item);
  const int64_t first = p.sequences.first_item(cu, rows, tiles, s);
  return {p.sequences.at(s), group, (item - first) * tiles.size, item, first};
}

template <typename T>
__device__ Tile find_query_tile(const BackwardParams<T>& p) {
  return find_tile(p, p.sequences.cu_q, p.queries, kQueryTiles);
}

// The sum over the CTA of each thread's x, for all of them, and of the threads before this one.
template <typename X>
struct Scan {
  X before;
  X total;
};

template <typename X>
__device__ Scan<X> scan_threads(X x) {
  __shared__ X warp_totals[kWarps];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  X through = x;
  for (int offset = 1; offset < 32; offset *= 2) {
    const X before = __shfl_up_sync(~0u, through, offset);
    if (lane >= offset) through += before;
  }
  X before = __shfl_up_sync(~0u, through, 1);
  if (lane == 0) before = 0;
  if (lane == 31) warp_totals[warp] = through;
  __syncthreads();
  X total = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) before += total;
    total += warp_totals[w];
  }
  __syncthreads();
  return {before, total};
}

// The first of [first, last) for which `holds` is false, where it is true up to some point and false from there on.
template <typename Holds>
__device__ int64_t partition_point(int64_t first, int64_t last, const Holds& holds) {
  while (first < last) {
    const int64_t middle = (first + last) / 2;
    if (holds(middle)) {
      first = middle + 1;
    } else {
      last = middle;
    }
  }
  return first;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    find_intervals(const __grid_constant__ BackwardParams<T> p, const __grid_constant__ Workspace work) {
  const Tile tile = find_tile(p, p.sequences.cu_k, p.keys, kKeyTiles);
  const Sequence& sequence = tile.sequence;
  const int64_t j = tile.begin + threadIdx.x;
  if (tile.begin < 0 || j >= sequence.keys) return;
  const int64_t head = sequence.batch * p.groups + tile.group;
  const T* threshold = p.threshold + head * p.queries + sequence.query_begin;
  const int64_t key = head * p.keys + sequence.key_begin + j;
  const T score = p.scores[key];
  const int64_t queries = sequence.queries;
  const int64_t enter = p.pattern.causal ? j + p.pattern.window - sequence.shift() : 0;
  const int64_t from = enter < 0 ? 0 : enter < queries ? enter : queries;
  const int64_t drop = partition_point(from, queries, [&](int64_t i) { return score > threshold[i]; });
  const int64_t soften = partition_point(from, drop, [&](int64_t i) { return !(score - threshold[i] < T(1)); });
  work.begin[key] = static_cast<int32_t>(soften);
  work.end[key] = static_cast<int32_t>(drop);
  if (soften == drop) return;
  int32_t* count = work.count + head * p.queries + sequence.query_begin;
  atomicAdd(count + soften, 1);
  if (drop < queries) atomicAdd(count + drop, -1);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    total_counts(const __grid_constant__ BackwardParams<T> p, const __grid_constant__ Workspace work) {
  const Tile tile = find_query_tile(p);
  const int64_t row = (tile.sequence.batch * p.groups + tile.group) * p.queries + tile.sequence.query_begin;
  int32_t sum = 0;
  if (tile.begin >= 0)
    for (int i = 0; i < kPerThread; ++i) {
      const int64_t query = tile.begin + threadIdx.x + i * kThreads;
      if (query < tile.sequence.queries) sum += work.count[row + query];
    }
  const int32_t total = scan_threads(sum).total;
  if (threadIdx.x == 0) work.count_totals[tile.item * p.groups + tile.group] = total;
}

// Turns query_sums into terms of the sums, query_sum / |F|, and totals them.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    share_sums(const __grid_constant__ BackwardParams<T> p, const __grid_constant__ Workspace work) {
  const Tile tile = find_query_tile(p);
  const int64_t row = (tile.sequence.batch * p.groups + tile.group) * p.queries + tile.sequence.query_begin;
  const int64_t first = tile.begin + static_cast<int64_t>(threadIdx.x) * kPerThread;
  const int64_t queries = tile.begin < 0 ? 0 : tile.sequence.queries;
  int32_t before = 0;
  for (int64_t t = tile.first_item + threadIdx.x; t < tile.item; t += kThreads)
    before += work.count_totals[t * p.groups + tile.group];
  int32_t change[kPerThread], sum = 0;
  for (int i = 0; i < kPerThread; ++i) {
    change[i] = first + i < queries ? work.count[row + first + i] : 0;
    sum += change[i];
  }
  int32_t count = scan_threads(before).total + scan_threads(sum).before;
  Total total{0, 0};
  for (int i = 0; i < kPerThread; ++i) {
    if (first + i >= queries) break;
    count += change[i];
    double* query_sum = p.query_sums + row + first + i;
    const double term = count > 0 ? *query_sum / count : 0;
    *query_sum = term;
    total.sum += isfinite(term) ? term : 0;
    total.bad += !isfinite(term);
  }
  total = {scan_threads(total.sum).total, scan_threads(total.bad).total};
  if (threadIdx.x == 0) work.term_totals[tile.item * p.groups + tile.group] = total;
}

// Turns the terms in query_sums into running sums.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    add_up(const __grid_constant__ BackwardParams<T> p, const __grid_constant__ Workspace work) {
  const Tile tile = find_query_tile(p);
  const int64_t row = (tile.sequence.batch * p.groups + tile.group) * p.queries + tile.sequence.query_begin;
  const int64_t first = tile.begin + static_cast<int64_t>(threadIdx.x) * kPerThread;
  const int64_t queries = tile.begin < 0 ? 0 : tile.sequence.queries;
  Total before{0, 0};
  for (int64_t t = tile.first_item + threadIdx.x; t < tile.item; t += kThreads) {
    before.sum += work.term_totals[t * p.groups + tile.group].sum;
    before.bad += work.term_totals[t * p.groups + tile.group].bad;
  }
  double term[kPerThread];
  Total mine{0, 0};
  for (int i = 0; i < kPerThread; ++i) {
    term[i] = first + i < queries ? p.query_sums[row + first + i] : 0;
    mine.sum += isfinite(term[i]) ? term[i] : 0;
    mine.bad += !isfinite(term[i]);
  }
  Total through{scan_threads(before.sum).total + scan_threads(mine.sum).before,
                scan_threads(before.bad).total + scan_threads(mine.bad).before};
  for (int i = 0; i < kPerThread; ++i) {
    if (first + i >= queries) break;
    through.sum += isfinite(term[i]) ? term[i] : 0;
    through.bad += !isfinite(term[i]);
    p.query_sums[row + first + i] = through.sum;
    work.count[row + first + i] = through.bad;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    write_gradients(const __grid_constant__ BackwardParams<T> p, const __grid_constant__ Workspace work) {
  const Tile tile = find_tile(p, p.sequences.cu_k, p.keys, kKeyTiles);
  const Sequence& sequence = tile.sequence;
  const int64_t j = tile.begin + threadIdx.x;
  if (tile.begin < 0 || j >= sequence.keys) return;
  const int64_t head = sequence.batch * p.groups + tile.group, row = head * p.queries + sequence.query_begin;
  const int64_t key = head * p.keys + sequence.key_begin + j;
  const int64_t begin = work.begin[key], end = work.end[key];
  const auto through = [&](int64_t i) {
    i = min(i, static_cast<int64_t>(sequence.queries));  // sequences that overlap, as none should, share the intervals
    return i == 0 ? Total{0, 0} : Total{p.query_sums[row + i - 1], work.count[row + i - 1]};
  };
  const Total from = through(begin), to = through(end);
  const double shared = from.bad == to.bad ? to.sum - from.sum : nan("");
  char* column = p.grad_scores.row(sequence.batch, sequence.key_begin, tile.group);
  with_stored(p.grad_scores.dtype, [&](auto stored) {
    write<typename decltype(stored)::type>(column, j * p.grad_scores.stride[3],
                                           static_cast<T>(p.key_sums[key] - shared));
  });
}

template <typename U>
U* data(const Tensor& tensor) {
  return static_cast<U*>(tensor.mutable_data_ptr());
}

}  // namespace

template <typename T>
void run_score_gradient(const BackwardParams<T>& params, const Tensor& reference, cudaStream_t stream) {
  const Sequences& sequences = params.sequences;
  if (sequences.count == 0) return;
  const int64_t groups = params.groups;
  const int64_t key_tiles = sequences.num_items(sequences.cu_k, params.keys, kKeyTiles);
  const int64_t query_tiles = sequences.num_items(sequences.cu_q, params.queries, kQueryTiles);
  const Tensor begin = make_empty(reference, {params.batch, groups, params.keys}, ScalarType::Int);
  const Tensor end = make_empty(reference, {params.batch, groups, params.keys}, ScalarType::Int);
  const Tensor count = make_zeros(reference, {params.batch, groups, params.queries}, ScalarType::Int);
  const Tensor count_totals = make_empty(reference, {query_tiles, groups}, ScalarType::Int);
  const Tensor term_totals =
      make_empty(reference, {query_tiles, groups, static_cast<int64_t>(sizeof(Total))}, ScalarType::Byte);
  const Workspace work{data<int32_t>(begin), data<int32_t>(end), data<int32_t>(count), data<int32_t>(count_totals),
                       data<Total>(term_totals)};
  launch("find_intervals", find_intervals<T>, key_tiles * groups, kThreads, 0, stream, params, work);
  launch("total_counts", total_counts<T>, query_tiles * groups, kThreads, 0, stream, params, work);
  launch("share_sums", share_sums<T>, query_tiles * groups, kThreads, 0, stream, params, work);
  launch("add_up", add_up<T>, query_tiles * groups, kThreads, 0, stream, params, work);
  launch("write_gradients", write_gradients<T>, key_tiles * groups, kThreads, 0, stream, params, work);
}

template void run_score_gradient(const BackwardParams<float>&, const Tensor&, cudaStream_t);
template void run_score_gradient(const BackwardParams<double>&, const Tensor&, cudaStream_t);

}  // namespace sparsek::cuda
