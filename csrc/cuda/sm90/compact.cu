#include <algorithm>

#include "cuda/common/launch.cuh"
#include "cuda/sm90/compact.h"

namespace sparsek::cuda::sm90 {
namespace {

constexpr int kThreads = 256;
constexpr int kAllocators = 1024;

// Gives lists their units, the last ones first: runs late in a sequence list the fewest rows for the pairs they see.
// One CTA.
__global__ void __launch_bounds__(kAllocators) allocate_units(const RunHead* head, int64_t lists, Compact compact) {
  __shared__ int64_t totals[kAllocators / 32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int64_t used = 0;
  for (int64_t base = 0; base < lists; base += kAllocators) {
    const int64_t list = lists - 1 - base - threadIdx.x;
    const int64_t units = list < 0 ? 0 : max((head[list].count + kUnit - 1) / kUnit, 0);
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
    if (list < 0) continue;
    const bool fits = units > 0 && first + units <= compact.units;
    compact.first_unit[list] = fits ? static_cast<int32_t>(first) : -1;
    for (int64_t unit = first; unit < min(first + units, compact.units); ++unit)
      compact.owner[unit] = fits ? static_cast<int32_t>(list) : -1;
  }
  for (int64_t unit = used + threadIdx.x; unit < compact.units; unit += kAllocators) compact.owner[unit] = -1;
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
    copy_units(const __grid_constant__ AttentionParams<float> p, const __grid_constant__ Plan plan,
               const __grid_constant__ Compact compact) {
  const int64_t unit = blockIdx.x;
  const int32_t list = compact.owner[unit];
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

}  // namespace

CompactMemory make_compact(const AttentionParams<float>& params, const Plan& plan, int width, int64_t readers,
                           const Tensor& reference, cudaStream_t stream) {
  constexpr int64_t kFewReaders = 8;
  if (readers < kFewReaders) return {};
  const Sequences& sequences = params.sequences;
  const int64_t lists = sequences.num_items(sequences.cu_k, params.keys, plan.runs) * params.groups;
  Compact compact{};
  const int64_t rows = params.batch * params.keys * params.groups;
  // Long sequences: with lists and the rest, at most half of what keys and values take.
  constexpr int64_t kLongSequence = 32768, kOtherBytes = 56;
  const int64_t row_bytes = 2 * 2 * width;
  const int64_t room = params.keys < kLongSequence ? rows * 3 / 2 : rows * (row_bytes / 2 - kOtherBytes) / row_bytes;
  compact.units = room / kUnit;
  if (compact.units == 0 || lists == 0) return {};
  const int64_t bytes = compact.units * kUnit * width * 2;
  const Tensor workspace = make_empty(
      reference, {2 * bytes + (compact.units + lists) * static_cast<int64_t>(sizeof(int32_t))}, ScalarType::Byte);
  compact.key = static_cast<char*>(workspace.mutable_data_ptr());
  compact.value = compact.key + bytes;
  compact.first_unit = reinterpret_cast<int32_t*>(compact.value + bytes);
  compact.owner = compact.first_unit + lists;
  launch("allocate_units", allocate_units, 1, kAllocators, 0, stream, plan.head, lists, compact);
  launch("copy_units", width == 64 ? copy_units<64> : copy_units<128>, compact.units, kThreads, 0, stream, params, plan,
         compact);
  return {compact, workspace};
}

}  // namespace sparsek::cuda::sm90
