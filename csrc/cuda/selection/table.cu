// Scores of any dtype and strides as a contiguous table, one sequence after the other.
#include "cuda/common/elements.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/selection/params.h"

namespace sparsek::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kKeys = 64;    // of a tile
constexpr int kGroups = 32;  // of a tile, at most

template <typename T>
__global__ void __launch_bounds__(kThreads) fill_table(TableParams<T> params) {
  __shared__ T tile[kGroups][kKeys + 1];
  const int64_t keys = params.sequences.keys;
  const int64_t key_tiles = divide(keys + kKeys - 1, kKeys), group_tiles = divide(params.groups + kGroups - 1, kGroups);
  const int64_t column = divide(blockIdx.x, key_tiles);
  const int64_t first_key = (blockIdx.x - column * key_tiles) * kKeys;
  const int64_t batch = divide(column, group_tiles);
  const int64_t first_group = (column - batch * group_tiles) * kGroups;
  const int num_keys = static_cast<int>(min(static_cast<int64_t>(kKeys), keys - first_key));
  const int num_groups = static_cast<int>(min(static_cast<int64_t>(kGroups), params.groups - first_group));
  // The tile is padded to powers of two, so that indices take no division.
  int group_bits = 0;
  while (1 << group_bits < num_groups) ++group_bits;
  const bool keys_are_close = params.scores.stride[1] == 1;  // else groups usually are
  with_stored(params.scores.dtype, [&](auto stored) {
    using Stored = typename decltype(stored)::type;
    for (int i = threadIdx.x; i < kKeys << group_bits; i += kThreads) {
      const int key = keys_are_close ? i % kKeys : i >> group_bits;
      const int group = keys_are_close ? i / kKeys : i & ((1 << group_bits) - 1);
      if (key >= num_keys || group >= num_groups) continue;
      const T score = read<T, Stored>(params.scores.row(batch, first_key + key, first_group + group), 0);
      tile[group][key] = score;
      if (isnan(score)) {
        const Sequences& sequences = params.sequences;
        const bool packed = sequences.cu_k != nullptr;
        const int64_t s = packed ? sequences.find(sequences.cu_k, keys, {1, 0}, first_key + key) : batch;
        params.has_nan[s * params.groups + first_group + group] = 1;
      }
    }
  });
  __syncthreads();
  for (int i = threadIdx.x; i < num_groups * kKeys; i += kThreads) {
    const int key = i % kKeys, group = i / kKeys;
    if (key < num_keys)
      params.table[(batch * params.groups + first_group + group) * keys + first_key + key] = tile[group][key];
  }
}

}  // namespace

template <typename T>
void launch_table(const TableParams<T>& params, cudaStream_t stream) {
  const int64_t key_tiles = (params.sequences.keys + kKeys - 1) / kKeys;
  const int64_t blocks = key_tiles * ((params.groups + kGroups - 1) / kGroups) * params.batch;
  if (params.sequences.count == 0) return;
  launch("fill_table", fill_table<T>, blocks, kThreads, 0, stream, params);
}

template void launch_table(const TableParams<float>&, cudaStream_t);
template void launch_table(const TableParams<double>&, cudaStream_t);

}  // namespace sparsek::cuda
