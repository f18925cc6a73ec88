#include <algorithm>

#include "cuda/common/launch.cuh"
#include "cuda/sm90/compact.h"

namespace sparsek::cuda::sm90 {
namespace {

constexpr int kThreads = 256;
constexpr int kAllocators = 1024;

// How many units of a list are to be copied: none where most keys enter within the run, for few tiles read each of
// them.
__device__ int64_t count_units(const RunHead& head) {
  return head.count < 2 * head.entering ? (head.count + kUnit - 1) / kUnit : 0;
}

// Gives the lists of a CTA's part their units, the last ones first: runs late in a sequence list the fewest rows for
// the pairs they see.
__global__ void __launch_bounds__(kAllocators)
    allocate_part(const RunHead* head, int64_t runs, int64_t all_groups, int64_t groups_of_part, Compact compact) {
  const int64_t first_group = blockIdx.x * groups_of_part, groups = min(groups_of_part, all_groups - first_group);
  int32_t* const owners = compact.owner + blockIdx.x * compact.units;
  __shared__ int64_t totals[kAllocators / 32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t lists = runs * groups;
  int64_t used = 0;
  for (int64_t base = 0; base < lists; base += kAllocators) {
    const int64_t rank = lists - 1 - base - threadIdx.x, run = rank < 0 ? 0 : divide(rank, groups);
    const int64_t list = run * all_groups + first_group + rank - run * groups;
    const int64_t units = rank < 0 ? 0 : count_units(head[list]);
    int64_t through = units;  // of this list and those before it in the warp
    for (int offset = 1; offset < 32; offset *= 2) {
      const int64_t before = __shfl_up_sync(~0u, through, offset);
      if (lane >= offset) through += before;
    }
    if (lane == 31) totals[warp] = through;
    __syncthreads();
    int64_t first = used + through - units;
    for (int w = 0; w < kAllocators / 32; ++w) {
      if (w < warp) first += totals[w];
      used += totals[w];
    }
    __syncthreads();
    const bool fits = units > 0 && first + units <= compact.units;
    if (rank >= 0) compact.first_unit[list] = fits ? static_cast<int32_t>(first) : -1;
    for (int from = 0; from < 32; ++from) {
      const int64_t begin = __shfl_sync(~0u, first, from);
      const int64_t end = min(begin + __shfl_sync(~0u, units, from), compact.units);
      const int32_t owner = __shfl_sync(~0u, fits ? static_cast<int32_t>(list) : -1, from);
      for (int64_t unit = begin + lane; unit < end; unit += 32) owners[unit] = owner;
    }
  }
  for (int64_t unit = used + threadIdx.x; unit < compact.units; unit += kAllocators) owners[unit] = -1;
}

template <int kWidth>
__device__ void copy_unit(const Rows& rows, const char* base, const int32_t* keys, int32_t count, char* to) {
  constexpr int kChunks = kWidth / 8, kRowsAtOnce = kThreads / kChunks, kSteps = kUnit / kRowsAtOnce;
  const int chunk = static_cast<int>(threadIdx.x) % kChunks, first = static_cast<int>(threadIdx.x) / kChunks;
  const int64_t stride = rows.stride[1] * 2;
  uint4 x[kSteps];
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int row = first + i * kRowsAtOnce;
    x[i] = {};
    if (row < count && 8 * chunk < rows.width)
      x[i] = __ldg(reinterpret_cast<const uint4*>(base + keys[row] * stride) + chunk);
  }
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int row = first + i * kRowsAtOnce;
    *reinterpret_cast<uint4*>(to + chunk / 8 * (kUnit * 128) + row * 128 + (chunk ^ row) % 8 * 16) = x[i];
  }
}

template <int kWidth>
__global__ void __launch_bounds__(kThreads)
    copy_part(const __grid_constant__ AttentionParams<float> p, const __grid_constant__ Plan plan,
              const __grid_constant__ Compact compact, int64_t part) {
  const int64_t unit = blockIdx.x;
  const int32_t list = compact.owner[part * compact.units + unit];
  if (list < 0) return;
  const int64_t item = divide(list, p.groups), group = list - item * p.groups;
  const Sequences& sequences = p.sequences;
  const int64_t s = sequences.find(sequences.cu_k, p.keys, plan.runs, item);
  const Sequence sequence = sequences.at(s);
  const int32_t slot = static_cast<int32_t>(unit - compact.first_unit[list]) * kUnit;
  const int32_t count = plan.head[list].count - slot;
  const int64_t first_block = sequences.first_item(sequences.cu_k, p.keys, plan.blocks, s);
  const int32_t* keys = plan.key + plan.first_slot(item, first_block, group, p.groups) + slot;
  const int64_t to = unit * kUnit * kWidth * 2;
  copy_unit<kWidth>(p.key, p.key.row(sequence.batch, sequence.key_begin, group), keys, count, compact.key + to);
  copy_unit<kWidth>(p.value, p.value.row(sequence.batch, sequence.key_begin, group), keys, count, compact.value + to);
}

int64_t count_runs(const AttentionParams<float>& params, const Plan& plan) {
  return params.sequences.num_items(params.sequences.cu_k, params.keys, plan.runs);
}

}  // namespace

CompactMemory make_compact(const AttentionParams<float>& params, const Plan& plan, int width, int64_t readers,
                           const Tensor& reference) {
  constexpr int64_t kFewReaders = 8;
  if (readers < kFewReaders) return {};
  const int64_t lists = count_runs(params, plan) * params.groups;
  Compact compact{};
  // What lists of 32768 keys with random scores name in all at k=1024.
  const int64_t rows = params.batch * params.keys * params.groups, usual = rows * 3 / 4;
  // Long sequences: with lists and the rest, at most half of what keys and values take.
  constexpr int64_t kLongSequence = 32768, kOtherBytes = 56;
  const int64_t row_bytes = 2 * 2 * width;
  const int64_t room = params.keys < kLongSequence ? 2 * usual : rows * (row_bytes / 2 - kOtherBytes) / row_bytes;
  compact.units = room / kUnit;
  if (compact.units == 0 || lists == 0) return {};
  const int64_t bytes = compact.units * kUnit * width * 2;
  const int64_t parts = room < usual && usual <= 2 * room ? 2 : 1, entries = lists + parts * compact.units;
  const Tensor workspace =
      make_empty(reference, {2 * bytes + entries * static_cast<int64_t>(sizeof(int32_t))}, ScalarType::Byte);
  compact.key = static_cast<char*>(workspace.mutable_data_ptr());
  compact.value = compact.key + bytes;
  compact.first_unit = reinterpret_cast<int32_t*>(compact.value + bytes);
  compact.owner = compact.first_unit + lists;
  return {compact, workspace, parts};
}

void allocate_units(const AttentionParams<float>& params, const Plan& plan, const Compact& compact,
                    int64_t groups_of_part, cudaStream_t stream) {
  const int64_t parts = (params.groups + groups_of_part - 1) / groups_of_part;
  launch("allocate_units", allocate_part, compact.units > 0 ? parts : 0, kAllocators, 0, stream, plan.head,
         count_runs(params, plan), params.groups, groups_of_part, compact);
}

void copy_units(const AttentionParams<float>& params, const Plan& plan, int width, const Compact& compact, int64_t part,
                cudaStream_t stream) {
  launch("copy_units", width == 64 ? copy_part<64> : copy_part<128>, compact.units, kThreads, 0, stream, params, plan,
         compact, part);
}

}  // namespace sparsek::cuda::sm90
