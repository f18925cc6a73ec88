// From thresholds after every key to the operator's results.
#include <cmath>
#include <limits>

#include "cuda/common/launch.cuh"
#include "cuda/selection/gates.cuh"
#include "cuda/selection/params.h"

namespace sparsek::cuda {
namespace {

constexpr int kThreads = 256;
constexpr Items kKeyItems{kThreads, 1};
constexpr Items kQueryItems{4 * kThreads, 1};

// The sequence and key/value head of a block, and its first row. Blocks of the same head come one after the other.
struct Place {
  Sequence sequence;
  int64_t column;  // in [sequences, G]
  int64_t head;    // in [B, G]
  int64_t row;

  // Block `block` of `blocks`.
  __device__ Place(const Sequences& sequences, int64_t groups, const int32_t* cu, int64_t rows, Items items,
                   int64_t block, int64_t blocks) {
    const int64_t items_of_group = divide(blocks, groups);
    const int64_t group = divide(block, items_of_group), item = block - group * items_of_group;
    const int64_t s = sequences.find(cu, rows, items, item);
    sequence = sequences.at(s);
    column = s * groups + group;
    head = sequence.batch * groups + group;
    row = (item - sequences.first_item(cu, rows, items, s)) * items.size;
  }
};

template <typename T>
__device__ void find_expiries(const OutputParams<T>& params, int64_t block, int64_t blocks) {
  const Sequences& sequences = params.sequences;
  const Place place(sequences, params.groups, sequences.cu_k, sequences.keys, kKeyItems, block, blocks);
  const int64_t keys = place.sequence.keys, key = place.row + threadIdx.x;
  if (key < 0 || key >= keys) return;
  const int64_t first = place.head * sequences.keys + place.sequence.key_begin;
  const T score = params.table[first + key];
  const T* const soft = params.soft + first;
  const auto* const hard = params.hard == nullptr ? nullptr : params.hard + first;
  const auto level = HardGate<T>::level(score, static_cast<int32_t>(key));
  const auto is_seen = [&](int32_t after) {
    if (hard != nullptr) return level > HardGate<T>::kLowest && level >= hard[after];
    return score > soft[after] || score == SoftGate<T>::kHighest;
  };
  int32_t expiry = kNever;
  const int64_t window = params.pattern.causal ? params.pattern.window : 0;
  const int64_t candidates = keys - window;
  if (params.has_nan[place.column] || key >= candidates || is_seen(static_cast<int32_t>(candidates - 1))) {
    expiry = kNever;
  } else if (!params.pattern.causal) {
    expiry = 0;
  } else {
    int32_t seen = static_cast<int32_t>(key) - 1, unseen = static_cast<int32_t>(candidates - 1);
    if (is_seen(seen + 1)) {
      ++seen;
    } else {
      unseen = seen + 1;  // as most keys
    }
    while (unseen - seen > 1) {
      const int32_t middle = seen + (unseen - seen) / 2;
      (is_seen(middle) ? seen : unseen) = middle;
    }
    expiry = static_cast<int32_t>(unseen + window);
  }
  params.expiry[first + key] = expiry;
}

template <typename T>
__device__ void write_thresholds(const OutputParams<T>& params, int64_t block, int64_t blocks) {
  const Sequences& sequences = params.sequences;
  const Place place(sequences, params.groups, sequences.cu_q, sequences.queries, kQueryItems, block, blocks);
  if (place.row < 0) return;
  const bool has_nan = params.has_nan[place.column];
  const T* const soft = params.soft + place.head * sequences.keys + place.sequence.key_begin;
  T* const threshold = params.threshold + place.head * sequences.queries + place.sequence.query_begin;
  const int64_t end = min(place.row + kQueryItems.size, static_cast<int64_t>(place.sequence.queries));
  for (int64_t query = place.row + threadIdx.x; query < end; query += kThreads) {
    const int64_t last_candidate =
        params.pattern.causal ? query + place.sequence.shift() - params.pattern.window : place.sequence.keys - 1;
    T result = last_candidate >= 0 ? soft[last_candidate] : SoftGate<T>::kLowest;
    // Finite, so that the gate of a pinned key, clip(inf - threshold), is 1.
    result = min(result, std::numeric_limits<T>::max());
    threshold[query] = has_nan ? std::numeric_limits<T>::quiet_NaN() : result;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    write_outputs(const __grid_constant__ OutputParams<T> params, int64_t key_blocks) {
  if (blockIdx.x < key_blocks) {
    find_expiries(params, blockIdx.x, key_blocks);
  } else {
    write_thresholds(params, blockIdx.x - key_blocks, gridDim.x - key_blocks);
  }
}

}  // namespace

template <typename T>
void launch_outputs(const OutputParams<T>& params, cudaStream_t stream) {
  const Sequences& sequences = params.sequences;
  const int64_t key_blocks = sequences.num_items(sequences.cu_k, sequences.keys, kKeyItems) * params.groups;
  const int64_t query_blocks = sequences.num_items(sequences.cu_q, sequences.queries, kQueryItems) * params.groups;
  launch("write_outputs", write_outputs<T>, key_blocks + query_blocks, kThreads, 0, stream, params, key_blocks);
}

template void launch_outputs(const OutputParams<float>&, cudaStream_t);
template void launch_outputs(const OutputParams<double>&, cudaStream_t);

}  // namespace sparsek::cuda
