// Gradients of the keys and values: a CTA gathers a block of keys once and goes through the queries that may see them.
// Keys in windows come first, as they lie, and their sums are stored. The lists of the runs follow: a run's sums are
// added to those of the runs before it, in order, so that gradients are the same bits every time.
#pragma once

#include <type_traits>

#include "cuda/common/launch.cuh"
#include "cuda/plan/tile.cuh"
#include "cuda/sm80/backward/gates.cuh"
#include "cuda/sm80/backward/launch.h"
#include "cuda/sm80/backward/tile.cuh"

namespace sparsek::cuda::sm80 {

// The keys that an item works on.
struct KeyWork {
  Sequence sequence;
  int64_t group;
  int64_t item;       // run, for lists
  bool follows;       // whether the sequence has a run before this one
  RunView run;        // for lists
  const char* query;  // of the first head, at position 0 of the sequence
  const char* grad_out;
  int64_t lse_row;        // the same in [B, H, Mq]
  int64_t threshold_row;  // and in [B, G, Mq]
  int64_t column;         // first key in [B, G, Mk]
  int32_t first_query;    // positions of the queries that may see them: [first_query, end_query)
  int32_t end_query;
  int32_t first;  // block of the item; the next one is `step` later
  int32_t step;
  int32_t blocks;
};

// In shared memory, also what all threads have in common: the registers are for the sums.
template <int kKeys, int kQueries>
struct KeyPassState {
  RowState rows[2][kQueries];
  int32_t keys[kKeys];  // or -1
  KeyWork work;
};

template <int W>
struct KeyPass {
  static constexpr int kKeys = keys_per_item(W);
  static constexpr int kTiles = W <= 64 ? 2 : 1;  // of 16 keys, per warp
  static constexpr int kQueries = W <= 64 ? 32 : W <= 128 ? 64 : 32;
  static constexpr int kSplit = 16 * kTiles * kWarps / kKeys;  // warps that share their keys, each for some columns
  static constexpr int kColumns = W / 8 / kSplit;              // of the sums, in tiles of 8
  static constexpr int kCtas = 2;

  static constexpr uint32_t kKeyTile = kKeys * kRowBytes<W>;
  static constexpr uint32_t kQueryTile = kQueries * kRowBytes<W>;

  static constexpr int64_t shared_bytes(int stages) {
    return 2 * kKeyTile + stages * 2 * kQueryTile + sizeof(KeyPassState<kKeys, kQueries>);
  }
};

struct KeyPassArguments {
  Workspace work;
  bool windows;  // else lists
  int32_t stages;
};

// What follows from the sequence and the group.
__device__ inline KeyWork make_work(const BackwardParams<float>& p, int64_t s, int64_t group) {
  KeyWork work{};
  work.sequence = p.sequences.at(s);
  work.group = group;
  const int64_t batch = work.sequence.batch, head = group * p.heads_per_group;
  const int64_t query = work.sequence.query_begin - (p.pattern.causal ? work.sequence.shift() : 0);
  work.query = p.query.row(batch, query, head);
  work.grad_out = p.grad_out.row(batch, query, head);
  work.lse_row = (batch * p.groups * p.heads_per_group + head) * p.queries + query;
  work.threshold_row = (batch * p.groups + group) * p.queries + query;
  work.column = (batch * p.groups + group) * p.keys + work.sequence.key_begin;
  return work;
}

template <int kKeys>
__device__ KeyWork find_window_work(const BackwardParams<float>& p, int64_t item) {
  constexpr Items kItems{kKeys, 1};
  const int64_t s = p.sequences.find(p.sequences.cu_k, p.keys, kItems, item / p.groups);
  KeyWork work = make_work(p, s, item % p.groups);
  const int64_t block = item / p.groups - p.sequences.first_item(p.sequences.cu_k, p.keys, kItems, s);
  work.first = static_cast<int32_t>(min(block, static_cast<int64_t>(kNever / kKeys)));
  work.step = 1;
  work.blocks = work.first * static_cast<int64_t>(kKeys) < work.sequence.keys ? work.first + 1 : 0;
  work.first_query = max(work.sequence.shift(), 0);
  work.end_query = work.sequence.keys;
  return work;
}

template <int kKeys>
__device__ KeyWork find_list_work(const BackwardParams<float>& p, const Plan& plan, int64_t items_per_run,
                                  int64_t ticket) {
  const int64_t item = ticket / items_per_run / p.groups;
  const int64_t s = p.sequences.find(p.sequences.cu_k, p.keys, plan.runs, item);
  KeyWork work = make_work(p, s, ticket / items_per_run % p.groups);
  const Sequence& sequence = work.sequence;
  work.item = item;
  work.first = static_cast<int32_t>(ticket % items_per_run);
  work.step = static_cast<int32_t>(items_per_run);
  const int64_t r = item - p.sequences.first_item(p.sequences.cu_k, p.keys, plan.runs, s);
  work.follows = r > 0;
  const int64_t begin = p.pattern.causal ? r * plan.runs.size : 0;
  if (sequence.queries == 0 || begin >= sequence.keys) return work;
  work.run = find_run(p, plan, sequence, s, work.group, static_cast<int32_t>(begin));
  work.blocks = (work.run.count + kKeys - 1) / kKeys;
  if (p.pattern.causal) {
    work.first_query = max(work.run.begin, max(work.sequence.shift(), 0));
    work.end_query = static_cast<int32_t>(min(begin + plan.runs.size, static_cast<int64_t>(sequence.keys)));
  } else {
    work.run.entering = work.run.count;
    work.end_query = sequence.queries;
  }
  return work;
}

// By all threads: waits until the run before has added its sums, and sees them.
__device__ __forceinline__ void wait_for_run(const int32_t* added, int64_t items) {
  if (threadIdx.x == 0) {
    while (*static_cast<const volatile int32_t*>(added) < items) __nanosleep(200);
    __threadfence();
  }
  __syncthreads();
}

// By all threads: makes sums visible to who waits.
__device__ __forceinline__ void announce(int32_t* added) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(added, 1);
}

// Tiles of the queries [begin, end), head by head.
struct QueryCursor {
  int32_t head;  // of the group
  int32_t begin;

  __device__ void advance(int32_t queries, int32_t first, int32_t end) {
    if (end - begin > queries) {
      begin += queries;
    } else {
      begin = first;
      ++head;
    }
  }
};

template <typename T, int W>
__global__ void __launch_bounds__(kThreads, KeyPass<W>::kCtas)
    differentiate_keys(const __grid_constant__ BackwardParams<float> p, const __grid_constant__ Plan plan,
                       const __grid_constant__ KeyPassArguments arguments) {
  using Pass = KeyPass<W>;
  constexpr int kKeys = Pass::kKeys, kQueries = Pass::kQueries, kTiles = Pass::kTiles, kColumns = Pass::kColumns;
  extern __shared__ __align__(1024) char tiles[];
  const uint32_t key_tile = shared_address(tiles), value_tile = key_tile + Pass::kKeyTile;
  const uint32_t query_tiles = value_tile + Pass::kKeyTile;  // [stages][query, grad_out]
  using State = KeyPassState<kKeys, kQueries>;
  State& shared = *reinterpret_cast<State*>(tiles + 2 * Pass::kKeyTile + arguments.stages * 2 * Pass::kQueryTile);

  const Workspace& space = arguments.work;
  const bool windows = arguments.windows;
  if (threadIdx.x == 0) {
    if (windows) {
      shared.work = find_window_work<kKeys>(p, blockIdx.x);
    } else {
      // By ticket, so that every run has been started before the runs that wait for it.
      shared.work = find_list_work<kKeys>(p, plan, space.items_per_run, atomicAdd(space.ticket, 1));
    }
  }
  __syncthreads();
  const KeyWork& work = shared.work;
  const Sequence& sequence = work.sequence;
  const RunView& run = work.run;
  int32_t* const keys = shared.keys;
  const int32_t window = static_cast<int32_t>(p.pattern.window);
  const float scale = static_cast<float>(p.scale) * kLog2e;
  const int width = static_cast<int>(p.query.width), value_width = static_cast<int>(p.value.width);
  const int32_t heads = static_cast<int32_t>(p.heads_per_group);
  const int lane = lane_id(), warp_key = warp_id() / Pass::kSplit * 16 * kTiles;
  const int first_column = warp_id() % Pass::kSplit * 8 * kColumns;

  bool waited = !work.follows;
  const auto wait = [&] {
    if (!waited) wait_for_run(space.added + (work.item - 1) * p.groups + work.group, space.items_per_run);
    waited = true;
  };

#pragma unroll 1
  for (int32_t block = work.first; block < work.blocks; block += work.step) {
    const int32_t first_slot = block * kKeys;                  // or key
    const auto from_position = [&](int32_t slot) -> int32_t {  // that sees a listed key by its score
      if (slot < run.entering) return std::numeric_limits<int32_t>::min();
      return static_cast<int32_t>(min(run.key_of(slot) + p.pattern.window, static_cast<int64_t>(kNever)));
    };
    int32_t begin = work.first_query, end = work.end_query;
    if (windows) {
      begin = max(begin, first_slot);
      end = static_cast<int32_t>(min(first_slot + kKeys - 1 + p.pattern.window, static_cast<int64_t>(end)));
    } else {
      begin = max(begin, from_position(first_slot));
      if (p.pattern.causal) {
        int32_t expiry = 0;
        for (int32_t slot = first_slot; slot < min(first_slot + kKeys, run.count); slot += kBlock)
          expiry = max(expiry, run.block_expiry[slot / kBlock * run.block_stride]);
        end = min(end, expiry);
      }
      if (begin >= end) continue;
    }

    const auto key_of = [&](int32_t slot) -> int32_t {
      if (windows) return slot < sequence.keys ? slot : -1;
      return slot < run.count ? run.key_of(slot) : -1;
    };
    if (threadIdx.x < kKeys) keys[threadIdx.x] = key_of(first_slot + static_cast<int32_t>(threadIdx.x));
    SlotState slots[2 * kTiles];  // of the lane's rows of the sums
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      const int32_t slot = first_slot + warp_key + 8 * i + lane / 4, key = key_of(slot);
      slots[i] = {-kInfinity, -kInfinity, windows ? slot : kNever};
      if (windows || key < 0) continue;
      slots[i] = {run.score_of(slot), p.pattern.hard ? p.scores[work.column + key] : 0.0f, from_position(slot)};
    }
    // Where all gates of the block are 1: from this position on, up to a threshold.
    int32_t open_from = kNever;
    float open_score = 0.0f;
    if (!windows && !p.pattern.hard && run.block_score != nullptr && first_slot + kKeys <= run.count) {
      open_from = from_position(first_slot + kKeys - 1);
      open_score = kInfinity;
      for (int32_t slot = first_slot; slot < first_slot + kKeys; slot += kBlock)
        open_score = min(open_score, run.block_score[slot / kBlock]);
    }
    __syncthreads();

    const auto copy_keys = [&](uint32_t target, const Rows& source) {
      const char* base = source.row(sequence.batch, sequence.key_begin, work.group);
      const int64_t stride = source.stride[1] * static_cast<int64_t>(sizeof(T));
      copy_rows<W, kKeys>(target, static_cast<int>(source.width),
                          [&](int c, const auto& copy) { copy(base + max(keys[c], 0) * stride, keys[c] >= 0); });
    };
    copy_keys(key_tile, p.key);
    copy_keys(value_tile, p.value);

    const auto copy_queries = [&](const QueryCursor& cursor, int stage) {
      const auto copy_from = [&](uint32_t target, const Rows& source, const char* base) {
        const int64_t stride = source.stride[1] * static_cast<int64_t>(sizeof(T));
        base += cursor.head * source.stride[2] * static_cast<int64_t>(sizeof(T)) + cursor.begin * stride;
        copy_adjacent_rows<W, kQueries>(target, static_cast<int>(source.width), base, stride, end - cursor.begin);
      };
      const uint32_t target = query_tiles + stage * 2 * Pass::kQueryTile;
      copy_from(target, p.query, work.query);
      copy_from(target + Pass::kQueryTile, p.grad_out, work.grad_out);
    };
    struct RawRow {
      float lse, delta, threshold;
    };
    const int own_row = static_cast<int>(threadIdx.x) % kQueries;
    const auto load_row = [&](const QueryCursor& cursor) -> RawRow {
      const int32_t position = cursor.begin + min(own_row, end - cursor.begin - 1);
      const int64_t row = work.lse_row + cursor.head * p.queries + position;
      return {p.lse[row], p.delta[row], p.threshold[work.threshold_row + position]};
    };
    // Only here is used what was loaded, a tile later.
    const auto publish_row = [&](int turn, const QueryCursor& cursor, const RawRow& row) {
      if (threadIdx.x >= kQueries) return;
      shared.rows[turn % 2][own_row] =
          own_row < end - cursor.begin
              ? make_row(row.lse, row.delta, row.threshold, p.pattern, cursor.begin + own_row - run.begin)
              : no_row();
    };

    float grad_key[kTiles][kColumns][4], grad_value[kTiles][kColumns][4];
    float gate_sums[2 * kTiles];
    for (bool careful = false;; careful = true) {
      set_zero(grad_key);
      set_zero(grad_value);
#pragma unroll
      for (float& sum : gate_sums) sum = 0.0f;
      QueryCursor cursor{begin < end ? 0 : heads, begin};
      if (cursor.head < heads) {
        publish_row(0, cursor, load_row(cursor));
        copy_queries(cursor, 0);
      }
      commit_copies();

#pragma unroll 1
      for (int turn = 0; cursor.head < heads; turn ^= 1) {
        QueryCursor next = cursor;
        next.advance(kQueries, begin, end);
        const bool more = next.head < heads;
        const RawRow row = load_row(more ? next : cursor);
        const int stage = arguments.stages == 2 ? turn : 0;
        wait_copies<0>();
        __syncthreads();  // all are done with the tile before, too
        if (arguments.stages == 2) {
          if (more) copy_queries(next, 1 - stage);
          commit_copies();
        }

        const uint32_t query_tile = query_tiles + stage * 2 * Pass::kQueryTile;
        const uint32_t grad_tile = query_tile + Pass::kQueryTile;
        const RowState* rows = shared.rows[turn];
        float logits[kTiles][kQueries / 8][4], grad_weights[kTiles][kQueries / 8][4];
        set_zero(logits);
        set_zero(grad_weights);
        multiply_transposed<T, W>(logits, key_tile + warp_key * kRowBytes<W>, query_tile, width);
        multiply_transposed<T, W>(grad_weights, value_tile + warp_key * kRowBytes<W>, grad_tile, value_width);

        const auto weigh = [&](auto gates) {
#pragma unroll
          for (int n = 0; n < kQueries / 8; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int r = 8 * n + lane % 4 * 2 + e;
              const RowState state = rows[r];
              const int32_t position = cursor.begin + r;
#pragma unroll
              for (int i = 0; i < 2 * kTiles; ++i)
                differentiate<decltype(gates)::value>(logits[i / 2][n][i % 2 * 2 + e],
                                                      grad_weights[i / 2][n][i % 2 * 2 + e], gate_sums[i], state,
                                                      slots[i], position, window, scale);
            }
        };
        const int last_row = min(end - cursor.begin, kQueries) - 1;
        if (windows) {
          weigh(std::integral_constant<Gates, Gates::kWindow>{});
        } else if (p.pattern.hard) {
          weigh(std::integral_constant<Gates, Gates::kHard>{});
        } else if (open_from <= cursor.begin && open_score - rows[last_row].threshold >= 1.0f) {
          weigh(std::integral_constant<Gates, Gates::kOpen>{});
        } else {
          weigh(std::integral_constant<Gates, Gates::kSoft>{});
        }

        uint32_t weight_factor[kTiles][kQueries / 16][4], logit_factor[kTiles][kQueries / 16][4];
        round_factor<T>(weight_factor, logits);
        round_factor<T>(logit_factor, grad_weights);
        if (careful) {
          multiply_rows<T, W, true>(grad_value, weight_factor, grad_tile, first_column, value_width);
          multiply_rows<T, W, true>(grad_key, logit_factor, query_tile, first_column, width);
        } else {
          multiply_rows<T, W, false>(grad_value, weight_factor, grad_tile, first_column, value_width);
          multiply_rows<T, W, false>(grad_key, logit_factor, query_tile, first_column, width);
        }

        if (more) publish_row(turn + 1, next, row);
        if (arguments.stages == 1) {
          __syncthreads();
          if (more) copy_queries(next, 0);
          commit_copies();
        }
        cursor = next;
      }
      if (!__syncthreads_or(!all_finite(grad_key) || !all_finite(grad_value)) || careful) break;
    }

    wait();
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      float sum = gate_sums[i];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      const int32_t own_key = keys[warp_key + 8 * i + lane / 4];
      if (own_key < 0) continue;
      const int64_t key = work.column + own_key;
      if (lane % 4 == 0 && first_column == 0) p.key_sums[key] = windows ? 0.0 : __ldcg(p.key_sums + key) + sum;
      const auto add_row = [&](float* sums, int64_t row_width, const float (&part)[kTiles][kColumns][4]) {
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
          const int c = first_column + 8 * n;
          if (c >= row_width) break;
          float2* target = reinterpret_cast<float2*>(sums + key * row_width + c + lane % 4 * 2);
          float2 total{part[i / 2][n][i % 2 * 2], part[i / 2][n][i % 2 * 2 + 1]};
          if (!windows) {
            const float2 before = __ldcg(target);  // from L2: other CTAs wrote it
            total = {before.x + total.x, before.y + total.y};
          }
          __stcg(target, total);
        }
      };
      add_row(space.grad_key, p.query.width, grad_key);
      add_row(space.grad_value, p.value.width, grad_value);
    }
    wait_copies<0>();
    __syncthreads();
  }
  if (windows) return;
  // A run that has counted all its items has waited for the runs before it.
  if (work.first == 0) wait();
  announce(space.added + work.item * p.groups + work.group);
}

template <typename T, int W>
void launch_key_pass(const BackwardParams<float>& params, const Plan& plan, const Workspace& work,
                     cudaStream_t stream) {
  using Pass = KeyPass<W>;
  const Sequences& sequences = params.sequences;
  const int stages = choose_stages(Pass::shared_bytes(1), Pass::shared_bytes(2));
  const auto run = [&](bool windows, int64_t items) {
    launch("differentiate_keys", differentiate_keys<T, W>, items * params.groups, kThreads, Pass::shared_bytes(stages),
           stream, params, plan, KeyPassArguments{work, windows, stages});
  };
  if (params.pattern.window > 0) run(true, sequences.num_items(sequences.cu_k, params.keys, {Pass::kKeys, 1}));
  run(false, sequences.num_items(sequences.cu_k, params.keys, plan.runs) * work.items_per_run);
}

}  // namespace sparsek::cuda::sm80
