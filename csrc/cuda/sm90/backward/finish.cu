// What comes before and after the products of the Hopper backward: how many units the lists have, and gradients from
// sums.
#include <algorithm>
#include <cmath>

#include "cuda/common/launch.cuh"
#include "cuda/common/ptx.cuh"
#include "cuda/sm90/backward/launch.h"
#include "cuda/sm90/backward/traits.cuh"

namespace sparsek::cuda::sm90 {
namespace {

constexpr int kThreads = 256;
constexpr int kCountThreads = 1024;

// One CTA: running sums over the runs, the last one first, and their packs of groups. All groups of a pack have room
// for as many units.
__global__ void __launch_bounds__(kCountThreads) find_units(const __grid_constant__ BackwardArguments a) {
  __shared__ int32_t warp_totals[kCountThreads / 32];
  const int64_t groups = a.params.groups, packs = (groups + kPack - 1) / kPack, total = a.num_runs * packs;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  int32_t before = 0;
  for (int64_t base = 0; base < total; base += kCountThreads) {
    const int64_t i = base + threadIdx.x;
    const int64_t first = i % packs * kPack, end = min(first + kPack, groups);
    int32_t mine = 0;
    for (int64_t group = first; i < total && group < end; ++group)
      mine = max(mine, count_units(a, a.num_runs - 1 - i / packs, group));
    mine *= static_cast<int32_t>(end - first);
    int32_t through = mine;
    for (int offset = 1; offset < 32; offset *= 2) {
      const int32_t other = __shfl_up_sync(~0u, through, offset);
      if (lane >= offset) through += other;
    }
    if (lane == 31) warp_totals[warp] = through;
    __syncthreads();
    int32_t all = 0;
    for (int w = 0; w < kCountThreads / 32; ++w) {
      if (w < warp) through += warp_totals[w];
      all += warp_totals[w];
    }
    if (i < total) a.first_unit[i + 1] = before + through;
    before += all;
    __syncthreads();
  }
  if (threadIdx.x == 0) a.first_unit[0] = 0;
}

template <typename Element>
__device__ void store_pair(char* row, int column, float x, float y) {
  *reinterpret_cast<uint32_t*>(row + 2 * column) = pack<Element>(x, y);
}

// Gradients of the queries of a tile and a group, and the sums of their gates' gradients.
template <typename Element, int kWidth, bool kCareful>
__device__ void finish_tile(const BackwardArguments& a, int64_t item, int64_t group) {
  constexpr int kRows = tile_rows(kWidth);
  const BackwardParams<float>& p = a.params;
  const QueryTile tile = find_query_tile(p, a.tiles, item, group * p.heads_per_group, 1);
  if (tile.last < tile.first) return;
  int32_t* const suspect = a.suspects + tile.sequence.batch * p.groups + group;
  if (kCareful && *suspect == 0) return;
  const float scale = static_cast<float>(p.scale);
  const float* threshold = p.threshold + (tile.sequence.batch * p.groups + group) * p.queries;
  const int half = static_cast<int>(threadIdx.x) / 128, thread = threadIdx.x % 128, lane = threadIdx.x % 32;
  const int row = (kRows == 128 ? half * 64 : 0) + thread / 32 * 16 + lane / 4;
  const int first_column = (kWidth == 128 ? half * 64 : 0) + lane % 4 * 2;
  const int width = static_cast<int>(p.query.width);
  float factor[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const bool exists = tile.exists(row + 8 * h);
    const float by = exists ? threshold[tile.query(row + 8 * h)] : 0.0f;
    factor[h] = by != by ? NAN : scale;  // NaN scores
  }
  const int own_row = threadIdx.x;  // of the sums of gates' gradients
  double gate_sum = 0.0;
  float zero = 0.0f;
  for (int64_t h = 0; h < p.heads_per_group; ++h) {
    const int64_t head = group * p.heads_per_group + h, place = head * a.num_tiles + item;
    const bool written = a.turns[place] != 0 || a.window_turns[place] != 0;
    const float* sums = a.tile_sums + place * tile_floats(kWidth);
    float4 sum[8];
#pragma unroll
    for (int i = 0; i < 8; ++i)
      sum[i] = written ? __ldcs(reinterpret_cast<const float4*>(sums) + (half * 8 + i) * 128 + thread)
                       : float4{0.0f, 0.0f, 0.0f, 0.0f};
    if (own_row < kRows && written)
#pragma unroll
      for (int w = 0; w < kPartialSums; ++w) gate_sum += sums[kTileSums + w * kRows + own_row];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      if (!tile.exists(row + 8 * k)) continue;
      char* to = p.grad_query.row(tile.sequence.batch, tile.query(row + 8 * k), head);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float x = k == 0 ? sum[i].x : sum[i].z, y = k == 0 ? sum[i].y : sum[i].w;
        zero = fmaf(x, 0.0f, fmaf(y, 0.0f, zero));
        if (first_column + 8 * i < width) store_pair<Element>(to, first_column + 8 * i, factor[k] * x, factor[k] * y);
      }
    }
  }
  if (!kCareful && zero != 0.0f) *suspect = a.suspects[p.batch * p.groups] = 1;
  if (own_row >= kRows || !tile.exists(own_row)) return;
  const float by = threshold[tile.query(own_row)];
  p.query_sums[(tile.sequence.batch * p.groups + group) * p.queries + tile.query(own_row)] = by != by ? NAN : gate_sum;
}

template <typename Element, int kWidth, bool kCareful>
__global__ void __launch_bounds__(kThreads) finish_queries(const __grid_constant__ BackwardArguments a) {
  if (kCareful && a.suspects[a.params.batch * a.params.groups] == 0) return;
  for (int64_t i = blockIdx.x; i < a.num_tiles * a.params.groups; i += gridDim.x)
    finish_tile<Element, kWidth, kCareful>(a, divide(i, a.params.groups), i % a.params.groups);
}

// What a key's sequence says about it.
struct KeyFacts {
  bool is_nan;  // its scores hold NaN: so does the last threshold
  bool seen;    // by some query, so that there are sums
};

__device__ KeyFacts find_facts(const BackwardParams<float>& p, int64_t batch, int64_t group, int64_t key) {
  const Sequences& sequences = p.sequences;
  const Sequence sequence =
      sequences.at(sequences.cu_k == nullptr ? batch : sequences.find(sequences.cu_k, p.keys, {1, 0}, key));
  const int64_t own = key - sequence.key_begin;
  if (own < 0 || own >= sequence.keys) return {false, false};
  bool is_nan = false;
  if (sequence.queries > 0) {
    const float threshold =
        p.threshold[(batch * p.groups + group) * p.queries + sequence.query_begin + sequence.queries - 1];
    is_nan = threshold != threshold;
  }
  if (p.pattern.window > 0) return {is_nan, true};
  const int32_t expiry = p.expiry[(batch * p.groups + group) * p.keys + key];
  if (sequence.queries == 0 || is_nan) return {is_nan, false};
  if (!p.pattern.causal) return {is_nan, expiry == kNever};
  return {is_nan, expiry > max(own, static_cast<int64_t>(max(sequence.shift(), 0)))};
}

// Rounds eight sums of row `row` of `sums` [B, G, Mk, width] into gradients.
template <typename Element>
__device__ void finish_chunk(const float* sums, int64_t row, const Rows& rows, char* to, int chunk, bool seen,
                             float factor) {
  if (chunk * 8 >= rows.width) return;
  float4 low{}, high{};
  if (seen) {
    const float4* source = reinterpret_cast<const float4*>(sums + row * rows.width) + 2 * chunk;
    low = __ldcs(source), high = __ldcs(source + 1);
  }
  reinterpret_cast<uint4*>(to)[chunk] =
      uint4{pack<Element>(factor * low.x, factor * low.y), pack<Element>(factor * low.z, factor * low.w),
            pack<Element>(factor * high.x, factor * high.y), pack<Element>(factor * high.z, factor * high.w)};
}

// Gradients of keys and values from their sums: eight columns of a row per thread.
template <typename Element, int kWidth, bool kCareful>
__global__ void __launch_bounds__(kThreads) finish_keys(const __grid_constant__ BackwardArguments a) {
  const BackwardParams<float>& p = a.params;
  if (kCareful && a.suspects[p.batch * p.groups] == 0) return;
  constexpr int kChunks = kWidth / 8, kRowsAtOnce = kThreads / kChunks;
  const int chunk = static_cast<int>(threadIdx.x) % kChunks;
  const int64_t total = p.batch * p.groups * p.keys;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsAtOnce + threadIdx.x / kChunks; row < total;
       row += static_cast<int64_t>(gridDim.x) * kRowsAtOnce) {
    const int64_t head = divide(row, p.keys), key = row - head * p.keys;
    const int64_t batch = divide(head, p.groups), group = head - batch * p.groups;
    if (kCareful && a.suspects[head] == 0) continue;
    const KeyFacts facts = find_facts(p, batch, group, key);
    const float one = facts.is_nan ? NAN : 1.0f;
    if (facts.is_nan && chunk == 0) p.key_sums[row] = NAN;
    finish_chunk<Element>(a.grad_key, row, p.grad_key, p.grad_key.row(batch, key, group), chunk, facts.seen,
                          one * static_cast<float>(p.scale));
    finish_chunk<Element>(a.grad_value, row, p.grad_value, p.grad_value.row(batch, key, group), chunk, facts.seen, one);
  }
}

template <typename Element, bool kCareful>
void launch_finish_of(const BackwardArguments& a, int multiprocessors, cudaStream_t stream) {
  const BackwardParams<float>& p = a.params;
  const auto ctas = [&](int64_t needed) {
    return std::min<int64_t>(needed, static_cast<int64_t>(multiprocessors) * (kCareful ? 4 : 64));
  };
  launch("finish_queries",
         a.width == 64 ? finish_queries<Element, 64, kCareful> : finish_queries<Element, 128, kCareful>,
         ctas(a.num_tiles * p.groups), kThreads, 0, stream, a);
  const int64_t rows_at_once = kThreads / (a.width / 8), rows = p.batch * p.groups * p.keys;
  launch("finish_keys", a.width == 64 ? finish_keys<Element, 64, kCareful> : finish_keys<Element, 128, kCareful>,
         ctas((rows + rows_at_once - 1) / rows_at_once), kThreads, 0, stream, a);
}

}  // namespace

void launch_count(const BackwardArguments& arguments, cudaStream_t stream) {
  launch("find_units", find_units, 1, kCountThreads, 0, stream, arguments);
}

void launch_finish(const BackwardArguments& arguments, bool careful, int multiprocessors, cudaStream_t stream) {
  const bool bf16 = arguments.params.query.dtype == torch::headeronly::ScalarType::BFloat16;
  const auto finish = bf16 ? careful ? launch_finish_of<__nv_bfloat16, true> : launch_finish_of<__nv_bfloat16, false>
                      : careful ? launch_finish_of<__half, true>
                                : launch_finish_of<__half, false>;
  finish(arguments, multiprocessors, stream);
}

}  // namespace sparsek::cuda::sm90
