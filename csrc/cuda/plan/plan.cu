#include <algorithm>
#include <limits>

#include "cuda/common/launch.cuh"
#include "cuda/plan/plan.h"

namespace sparsek::cuda {
namespace {

constexpr int kPerThread = 8;  // keys whose loads are under way together

// What decides whether a key is in a run's list, and where.
struct Run {
  int32_t begin;   // first position of the run
  int32_t first;   // position of its first query
  int64_t window;  // a key competes from position key + window on
  bool causal;
  float threshold;        // of its first query
  const int32_t* expiry;  // [keys of the sequence]
  const float* score;     // [keys of the sequence]

  // Of a key that competes at the first query.
  __device__ bool is_seen_at_once(int32_t expires) const { return causal ? expires > first : expires == kNever; }
  // Of a key that competes later.
  __device__ bool is_seen_later(int32_t key, int32_t expires) const { return expires > key + window; }

  // The order of what is seen at once: by score, the highest first; from 4 above the first threshold on, as the keys
  // lie. How far a score exceeds the first threshold tells how soon its gate sinks below 1 and reaches 0 as thresholds
  // rise within the run.
  static constexpr int kLevels = 64;
  __device__ int level(float u) const {
    constexpr float kHighest = 4.0f, kPerUnit = (kLevels - 2) / kHighest;
    const float above = u - threshold;
    return above < kHighest ? 1 + static_cast<int>(fminf((kHighest - above) * kPerUnit, kLevels - 2)) : 0;
  }
};

// The threads of a CTA that makes one run's list.
template <int kThreads>
struct Lister {
  static constexpr int kWarps = kThreads / 32, kStep = kThreads * kPerThread;
  int32_t warp_counts[2][kWarps];
  int32_t level_slots[kWarps][Run::kLevels];

  // Calls visit(key, rank) for the keys of [begin, end) that are seen(key, expiry), in ascending order; returns how
  // many there are.
  template <typename Seen, typename Visit>
  __device__ int32_t scan(const int32_t* expiry, int32_t begin, int32_t end, const Seen& seen, const Visit& visit) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int32_t filled = 0;
    int turn = 0;
    __syncthreads();  // warp_counts may be in use
    for (int64_t base = begin; base < end; base += kStep, turn ^= 1) {
      const int64_t start = base + warp * 32 * kPerThread + lane;
      int32_t expires[kPerThread];
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) expires[i] = start + i * 32 < end ? expiry[start + i * 32] : 0;
      uint32_t votes[kPerThread];
      int32_t mine = 0;
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        const int64_t key = start + i * 32;
        votes[i] = __ballot_sync(~0u, key < end && seen(static_cast<int32_t>(key), expires[i]));
        mine += __popc(votes[i]);
      }
      if (lane == 0) warp_counts[turn][warp] = mine;
      __syncthreads();  // one barrier a step: the other half of warp_counts is free by the next
      const int32_t count = lane < kWarps ? warp_counts[turn][lane] : 0;
      int32_t rank = filled + __reduce_add_sync(~0u, lane < warp ? count : 0);
      filled += __reduce_add_sync(~0u, count);
      if (mine == 0) continue;
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        if (votes[i] >> lane & 1) visit(static_cast<int32_t>(start) + i * 32, rank + __popc(votes[i] & below(lane)));
        rank += __popc(votes[i]);
      }
    }
    return filled;
  }

  // Writes keys [count] to `out`, ordered by their levels and, on equal ones, as they are. `levels` is scratch of that
  // size.
  __device__ void sort(const Run& run, const int32_t* keys, uint8_t* levels, int32_t count, int32_t* out) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int32_t share = (count + kThreads - 1) / kThreads * 32;  // of a warp: keys next to each other
    const int32_t begin = min(warp * share, count), end = min(begin + share, count);
    int32_t* const slots = level_slots[warp];
    for (int level = lane; level < Run::kLevels; level += 32) slots[level] = 0;
#pragma unroll 4
    for (int32_t i = begin + lane; i < end; i += 32) levels[i] = static_cast<uint8_t>(run.level(run.score[keys[i]]));
    __syncwarp();
    for (int32_t base = begin; base < end; base += 32) {
      const int32_t i = base + lane;
      const int level = i < end ? levels[i] : Run::kLevels;
      const uint32_t peers = __match_any_sync(~0u, level);
      if (i < end && (peers & below(lane)) == 0) slots[level] += __popc(peers);
      __syncwarp();
    }
    __syncthreads();
    if (warp == 0) {
      constexpr int kOfLane = Run::kLevels / 32;
      int32_t counts[kOfLane][kWarps], sum = 0;
#pragma unroll
      for (int l = 0; l < kOfLane; ++l) {
#pragma unroll
        for (int w = 0; w < kWarps; ++w) sum += counts[l][w] = level_slots[w][kOfLane * lane + l];
      }
      int32_t slot = sum;
#pragma unroll
      for (int offset = 1; offset < 32; offset *= 2) {
        const int32_t other = __shfl_up_sync(~0u, slot, offset);
        slot += lane >= offset ? other : 0;
      }
      slot -= sum;
#pragma unroll
      for (int l = 0; l < kOfLane; ++l) {
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
          level_slots[w][kOfLane * lane + l] = slot;
          slot += counts[l][w];
        }
      }
    }
    __syncthreads();
    for (int32_t base = begin; base < end; base += 32) {
      const int32_t i = base + lane;
      const int level = i < end ? levels[i] : Run::kLevels;
      const uint32_t peers = __match_any_sync(~0u, level);
      if (i < end) out[slots[level] + __popc(peers & below(lane))] = keys[i];
      __syncwarp();
      if (i < end && (peers & below(lane)) == 0) slots[level] += __popc(peers);
      __syncwarp();
    }
  }

 private:
  __device__ static uint32_t below(int lane) { return (1u << lane) - 1; }
};

// The latest expiry of each block of keys in [begin, end).
template <int kThreads>
__device__ void bound_blocks(const int32_t* expiry, int64_t begin, int64_t end, int32_t* out, int64_t stride) {
  for (int64_t block = begin / kBlock + threadIdx.x / 32; block * kBlock < end; block += kThreads / 32) {
    int32_t latest = 0;
    for (int64_t key = block * kBlock + threadIdx.x % 32; key < min((block + 1) * kBlock, end); key += 32)
      latest = max(latest, expiry[key]);
    latest = __reduce_max_sync(~0u, latest);
    if (threadIdx.x % 32 == 0) out[block * stride] = latest;
  }
}

// `room`: for keys that are sorted together, in shared memory behind the Lister.
template <int kThreads>
__global__ void __launch_bounds__(kThreads, 1536 / kThreads)
    list_runs(const __grid_constant__ AttentionParams<float> p, const __grid_constant__ Plan plan, int64_t room) {
  extern __shared__ __align__(16) char memory[];
  auto& lister = *reinterpret_cast<Lister<kThreads>*>(memory);
  int32_t* const keys = reinterpret_cast<int32_t*>(memory + sizeof(lister));
  uint8_t* const levels = reinterpret_cast<uint8_t*>(keys + room);
  const Sequences& sequences = p.sequences;
  // Late runs look at more keys, and so start first.
  const int64_t index = static_cast<int64_t>(gridDim.x) - 1 - blockIdx.x;
  const int64_t item = divide(index, p.groups), group = index - item * p.groups;
  const int64_t s = sequences.find(sequences.cu_k, p.keys, plan.runs, item);
  const Sequence sequence = sequences.at(s);
  const int64_t r = item - sequences.first_item(sequences.cu_k, p.keys, plan.runs, s);
  const int64_t first_block = sequences.first_item(sequences.cu_k, p.keys, plan.blocks, s);
  const int64_t first_slot = plan.first_slot(item, first_block, group, p.groups);
  RunHead& head = plan.head[item * p.groups + group];

  const int64_t column = (sequence.batch * p.groups + group) * p.keys + sequence.key_begin;
  const float* threshold = p.threshold + (sequence.batch * p.groups + group) * p.queries + sequence.query_begin;
  Run run{0, 0, p.pattern.window, p.pattern.causal, 0.0f, p.expiry + column, p.scores + column};
  int64_t end = sequence.keys;  // of the keys that may be listed
  int64_t old_end = end;        // of those that compete at the first query
  bool empty = sequence.queries == 0 || sequence.keys == 0;
  if (p.pattern.causal) {
    const int64_t begin = r * plan.runs.size;
    const int64_t run_end = min(begin + plan.runs.size, static_cast<int64_t>(sequence.keys));
    bound_blocks<kThreads>(run.expiry, begin, run_end, plan.dense_expiry + first_block * p.groups + group, p.groups);
    run.begin = static_cast<int32_t>(min(begin, static_cast<int64_t>(kNever)));
    run.first = max(run.begin, max(sequence.shift(), 0));
    end = run_end - p.pattern.window;
    old_end = max(min(run.first - p.pattern.window + 1, end), int64_t{0});
    empty = empty || run.first >= run_end || end <= 0;
  }
  if (!empty) {
    run.threshold = threshold[p.pattern.causal ? run.first - sequence.shift() : 0];
    empty = run.threshold != run.threshold;  // NaN scores: the kernels write NaN without looking at any key
  }
  if (empty) {
    if (threadIdx.x == 0) head = {0, 0};
    return;
  }

  int32_t* key_out = plan.key + first_slot;
  float* score_out = plan.score + first_slot;
  // Not causal: piece by piece, each sorted for itself.
  const int64_t piece = p.pattern.causal ? max(old_end, int64_t{1}) : room;
  int32_t count = 0;
  for (int64_t begin = 0; begin < old_end; begin += piece) {
    const int32_t seen = lister.scan(
        run.expiry, static_cast<int32_t>(begin), static_cast<int32_t>(min(begin + piece, old_end)),
        [&](int32_t, int32_t expires) { return run.is_seen_at_once(expires); },
        [&](int32_t key, int32_t rank) {
          if (rank < room) keys[rank] = key;
        });
    // Keys enter one a position, so that what was there before decides: later tokens must not change the order of sums.
    if (plan.list_size > 0 && seen > plan.list_size - plan.runs.size) {
      if (threadIdx.x == 0) head = {kDense, 0};
      return;
    }
    __syncthreads();
    lister.sort(run, keys, levels, seen, key_out + count);
    count += seen;
    __syncthreads();
  }
  const int32_t entering = count;
  count += lister.scan(
      run.expiry, static_cast<int32_t>(old_end), static_cast<int32_t>(end),
      [&](int32_t key, int32_t expires) { return run.is_seen_later(key, expires); },
      [&](int32_t key, int32_t rank) { key_out[entering + rank] = key; });
  if (threadIdx.x == 0) head = {count, entering};
  __syncthreads();
  constexpr int kOfLane = kBlock / 32;
  for (int32_t block = threadIdx.x / 32; block * kBlock < count; block += kThreads / 32) {
    int32_t expires[kOfLane];
    float score = std::numeric_limits<float>::infinity();
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      const int32_t slot = block * kBlock + i * 32 + threadIdx.x % 32;
      expires[i] = 0;
      if (slot >= count) {  // kernels read whole blocks
        key_out[slot] = -1;
        score_out[slot] = -std::numeric_limits<float>::infinity();
        continue;
      }
      const int32_t key = key_out[slot];
      expires[i] = run.expiry[key];
      const float u = p.pattern.hard ? static_cast<float>(min(expires[i] - run.begin, kFarAhead)) : run.score[key];
      score_out[slot] = u;
      score = fminf(score, u);
    }
    int32_t expiry = 0;
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) expiry = max(expiry, expires[i]);
    expiry = __reduce_max_sync(~0u, expiry);
    for (int offset = 16; offset > 0; offset /= 2) score = fminf(score, __shfl_xor_sync(~0u, score, offset));
    if (threadIdx.x % 32 == 0) {
      plan.block_expiry[first_slot / kBlock + block] = expiry;
      plan.block_score[first_slot / kBlock + block] = score;
    }
  }
}

int64_t mean_keys(const Sequences& sequences) {
  return sequences.cu_k == nullptr ? sequences.keys : sequences.keys / std::max<int64_t>(sequences.count, 1);
}

constexpr int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

}  // namespace

int32_t heads_per_tile(int64_t heads_per_group) {
  constexpr int32_t kMostHeads = 16;
  int32_t heads = 1;
  while (heads < kMostHeads && heads_per_group % (2 * heads) == 0) heads *= 2;
  return heads;
}

// A sixteenth of a sequence leaves room for supports of up to about a fifth of its keys.
int64_t forward_run_size(const Sequences& sequences, int64_t tile_rows) {
  const int64_t keys = mean_keys(sequences);
  int64_t size = 512;
  while (size < 4096 && size * 16 < keys) size *= 2;
  return round_up(size, tile_rows);
}

// Each run adds to the sums of the one before it, and its queries, of all heads, are to stay in the L2 cache.
int64_t backward_run_size(const Sequences& sequences, int64_t heads_per_group) {
  const int64_t keys = mean_keys(sequences);
  int64_t size = 1024;
  while (size < 4096 && (size * heads_per_group < 2048 || size * std::min<int64_t>(heads_per_group, 2) * 64 <= keys))
    size *= 2;
  return size;
}

PlanMemory make_plan(const AttentionParams<float>& params, int64_t run_size, const Tensor& reference,
                     cudaStream_t stream) {
  const Sequences& sequences = params.sequences;
  const bool causal = params.pattern.causal;
  Plan plan{};
  // Four slots per position are 32 bytes a token.
  plan.runs = causal ? Items{run_size, 1} : Items{kNever, 1};
  plan.blocks = {kBlock, 1};
  plan.list_size = causal ? 4 * run_size : 0;
  plan.num_blocks = sequences.num_items(sequences.cu_k, params.keys, plan.blocks);
  const int64_t lists = sequences.num_items(sequences.cu_k, params.keys, plan.runs) * params.groups;
  const int64_t slots = causal ? lists * plan.list_size : params.groups * plan.num_blocks * kBlock;

  constexpr int64_t kSlack = 1024;  // kernels read whole units of slots, and look at those that exist
  int64_t bytes = 0;
  const auto reserve = [&](int64_t count, int64_t size) {
    const int64_t offset = bytes;
    bytes = round_up(bytes + count * size, 16);
    return offset;
  };
  const int64_t head = reserve(lists, sizeof(RunHead)), key = reserve(slots, 4), score = reserve(slots, 4);
  const int64_t block_expiry = reserve(slots / kBlock, 4), block_score = reserve(slots / kBlock, 4);
  const int64_t dense_expiry = reserve(plan.num_blocks * params.groups, 4);
  Tensor workspace = make_empty(reference, {bytes + kSlack}, ScalarType::Byte);
  char* base = static_cast<char*>(workspace.mutable_data_ptr());
  plan.head = reinterpret_cast<RunHead*>(base + head);
  plan.key = reinterpret_cast<int32_t*>(base + key);
  plan.score = reinterpret_cast<float*>(base + score);
  plan.block_expiry = reinterpret_cast<int32_t*>(base + block_expiry);
  plan.block_score = reinterpret_cast<float*>(base + block_score);
  plan.dense_expiry = reinterpret_cast<int32_t*>(base + dense_expiry);

  constexpr int64_t kPiece = 8192, kShort = 2048;
  const int64_t room = std::max<int64_t>(std::min(causal ? plan.list_size - run_size : kPiece, params.keys), 1);
  const bool is_short = params.keys <= (sequences.cu_k == nullptr ? kShort : kShort * sequences.count);
  const auto list = [&](auto kernel, int threads, size_t size) {
    launch("list_runs", kernel, lists, threads, size + room * (sizeof(int32_t) + sizeof(uint8_t)), stream, params, plan,
           room);
  };
  if (is_short) {
    list(list_runs<128>, 128, sizeof(Lister<128>));
  } else {
    list(list_runs<512>, 512, sizeof(Lister<512>));
  }
  return {plan, workspace};
}

}  // namespace sparsek::cuda
