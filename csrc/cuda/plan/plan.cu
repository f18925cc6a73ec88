#include <algorithm>
#include <limits>

#include "cuda/common/launch.cuh"
#include "cuda/plan/plan.h"

namespace sparsek::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kPerThread = 4;
constexpr int kStep = kThreads * kPerThread;  // keys looked at together

// The parts of a list, in order. What a key's score exceeds the first threshold by tells how soon its gate sinks below
// 1 and reaches 0 as thresholds rise within the run.
constexpr int kParts = 5;
constexpr float kSolid = 1.25f, kLasting = 0.4f, kFading = 0.15f;
enum Part { kEntering = kParts - 1, kUnseen = kParts };

// What decides which part of a run's list a key belongs to.
struct Run {
  int32_t begin;   // first position of the run
  int32_t first;   // position of its first query
  int64_t window;  // a key competes from position key + window on
  bool causal;
  float threshold;        // of its first query
  const int32_t* expiry;  // [keys of the sequence]
  const float* score;     // [keys of the sequence]

  __device__ int part(int32_t key) const {
    if (!causal) {
      if (expiry[key] != kNever) return kUnseen;
    } else {
      const int64_t entry = key + window;
      if (entry > first) return expiry[key] > entry ? kEntering : kUnseen;
      if (expiry[key] <= first) return kUnseen;
    }
    const float u = score[key];
    return u >= threshold + kSolid ? 0 : u >= threshold + kLasting ? 1 : u >= threshold + kFading ? 2 : 3;
  }
};

struct Counts {
  int32_t part[kParts];

  __device__ int32_t before(int part_) const {
    int32_t sum = 0;
#pragma unroll
    for (int c = 0; c < kParts; ++c) sum += c < part_ ? part[c] : 0;
    return sum;
  }
};

// Calls visit(key, part, rank in its part) for the seen keys among [0, end), in ascending order within each part.
// Returns how many of each part there are.
template <typename Visit>
__device__ Counts for_each_seen(const Run& run, int32_t end, const Visit& visit) {
  __shared__ int32_t warp_counts[2][kWarps][kParts];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t below = (1u << lane) - 1;
  Counts total{};
  int turn = 0;
  for (int32_t base = 0; base < end; base += kStep, turn ^= 1) {
    int parts[kPerThread];
    int32_t mine[kParts] = {};
    const int32_t start = base + warp * 32 * kPerThread + lane;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int32_t key = start + i * 32;
      parts[i] = key < end ? run.part(key) : kUnseen;
#pragma unroll
      for (int c = 0; c < kParts; ++c) mine[c] += __popc(__ballot_sync(~0u, parts[i] == c));
    }
#pragma unroll
    for (int c = 0; c < kParts; ++c)
      if (lane == c) warp_counts[turn][warp][c] = mine[c];
    __syncthreads();  // one barrier a step: the other half of warp_counts is free by the next
#pragma unroll
    for (int c = 0; c < kParts; ++c) {
      int32_t rank = total.part[c];
      for (int w = 0; w < kWarps; ++w) {
        const int32_t count = warp_counts[turn][w][c];
        if (w < warp) rank += count;
        total.part[c] += count;
      }
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        const uint32_t votes = __ballot_sync(~0u, parts[i] == c);
        if (parts[i] == c) visit(start + i * 32, c, rank + __popc(votes & below));
        rank += __popc(votes);
      }
    }
  }
  return total;
}

__global__ void __launch_bounds__(kThreads)
    list_runs(const __grid_constant__ AttentionParams<float> p, const __grid_constant__ Plan plan) {
  const Sequences& sequences = p.sequences;
  const int64_t item = blockIdx.x / p.groups, group = blockIdx.x % p.groups;
  const int64_t s = sequences.find(sequences.cu_k, p.keys, plan.runs, item);
  const Sequence sequence = sequences.at(s);
  const int64_t r = item - sequences.first_item(sequences.cu_k, p.keys, plan.runs, s);
  const int64_t first_slot =
      plan.first_slot(item, sequences.first_item(sequences.cu_k, p.keys, plan.blocks, s), group, p.groups);
  RunHead& head = plan.head[item * p.groups + group];

  const int64_t column = (sequence.batch * p.groups + group) * p.keys + sequence.key_begin;
  const float* threshold = p.threshold + (sequence.batch * p.groups + group) * p.queries + sequence.query_begin;
  Run run{0, 0, p.pattern.window, p.pattern.causal, 0.0f, p.expiry + column, p.scores + column};
  int64_t end = sequence.keys;  // of the keys that may be listed
  bool empty = sequence.queries == 0 || sequence.keys == 0;
  if (p.pattern.causal) {
    const int64_t begin = r * plan.runs.size;
    const int64_t run_end = min(begin + plan.runs.size, static_cast<int64_t>(sequence.keys));
    run.begin = static_cast<int32_t>(min(begin, static_cast<int64_t>(kNever)));
    run.first = max(run.begin, max(sequence.shift(), 0));
    end = run_end - p.pattern.window;
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

  const int32_t last = static_cast<int32_t>(end);
  const Counts counts = for_each_seen(run, last, [](int32_t, int, int32_t) {});
  const int32_t entering = counts.before(kEntering), count = counts.before(kParts);
  // Keys enter one a position, so that what was there before decides: later tokens must not change the order of sums.
  if (plan.list_size > 0 && entering > plan.list_size - plan.runs.size) {
    if (threadIdx.x == 0) head = {kDense, 0};
    return;
  }
  if (threadIdx.x == 0) head = {count, entering};
  __syncthreads();  // the shared counts are used again
  int32_t* key_out = plan.key + first_slot;
  float* score_out = plan.score + first_slot;
  for_each_seen(run, last, [&](int32_t key, int part, int32_t rank) {
    const int32_t slot = rank + counts.before(part);
    key_out[slot] = key;
    score_out[slot] = p.pattern.hard ? static_cast<float>(min(run.expiry[key] - run.begin, kFarAhead)) : run.score[key];
  });
  __syncthreads();
  for (int32_t block = threadIdx.x / 32; block * kBlock < count; block += kWarps) {
    int32_t expiry = 0;
    float score = std::numeric_limits<float>::infinity();
    for (int32_t slot = block * kBlock + threadIdx.x % 32; slot < min(count, (block + 1) * kBlock); slot += 32) {
      expiry = max(expiry, run.expiry[key_out[slot]]);
      score = fminf(score, score_out[slot]);
    }
    expiry = __reduce_max_sync(~0u, expiry);
    for (int offset = 16; offset > 0; offset /= 2) score = fminf(score, __shfl_xor_sync(~0u, score, offset));
    if (threadIdx.x % 32 == 0) {
      plan.block_expiry[first_slot / kBlock + block] = expiry;
      plan.block_score[first_slot / kBlock + block] = score;
    }
  }
}

// One warp per block of keys.
__global__ void __launch_bounds__(kThreads)
    bound_blocks(const __grid_constant__ AttentionParams<float> p, const __grid_constant__ Plan plan) {
  const Sequences& sequences = p.sequences;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (index >= plan.num_blocks * p.groups) return;
  const int64_t item = index / p.groups, group = index % p.groups;
  const int64_t s = sequences.find(sequences.cu_k, p.keys, plan.blocks, item);
  const Sequence sequence = sequences.at(s);
  const int64_t begin = (item - sequences.first_item(sequences.cu_k, p.keys, plan.blocks, s)) * kBlock;
  const int32_t* expiry = p.expiry + (sequence.batch * p.groups + group) * p.keys + sequence.key_begin;
  int32_t latest = 0;
  for (int64_t key = begin + threadIdx.x % 32; key < min(begin + kBlock, static_cast<int64_t>(sequence.keys));
       key += 32)
    latest = max(latest, expiry[key]);
  latest = __reduce_max_sync(~0u, latest);
  if (threadIdx.x % 32 == 0) plan.dense_expiry[index] = latest;
}

constexpr int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

}  // namespace

// A sixteenth of a sequence leaves room for supports of up to about a fifth of its keys.
int64_t forward_run_size(const Sequences& sequences) {
  const int64_t keys =
      sequences.cu_k == nullptr ? sequences.keys : sequences.keys / std::max<int64_t>(sequences.count, 1);
  int64_t size = 512;
  while (size < 4096 && size * 16 < keys) size *= 2;
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

  launch("list_runs", list_runs, lists, kThreads, 0, stream, params, plan);
  if (causal)
    launch("bound_blocks", bound_blocks, (plan.num_blocks * params.groups + kWarps - 1) / kWarps, kThreads, 0, stream,
           params, plan);
  return {plan, workspace};
}

}  // namespace sparsek::cuda
