// Thresholds and expiries of short sequences that are not causal: one result for each, found by a warp in one launch.
#include <limits>

#include "cuda/common/elements.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/selection/sequence.cuh"

namespace sparsek::cuda {
namespace {

constexpr int kGroups = 8;  // of a CTA, one per warp; their scores are often next to each other
constexpr int kThreads = kGroups * kWarpSize;
constexpr int64_t kMaxBytes = 64 * 1024;  // of scores

// Lanes with groups and keys next to each other write to different banks.
__host__ __device__ constexpr int64_t row_size(int64_t keys) { return (keys + 31) / 32 * 32 + 32 / kGroups; }

template <typename T>
__global__ void __launch_bounds__(kThreads, 3) solve_sequences(SequenceParams<T> params) {
  extern __shared__ __align__(16) char memory[];
  auto* const nearby = reinterpret_cast<NearbyMemory<HardGate<T>>*>(memory);  // the larger one
  T* const table = reinterpret_cast<T*>(nearby + kGroups);                    // [kGroups, row]
  const int32_t keys = static_cast<int32_t>(params.keys), row = static_cast<int32_t>(row_size(keys));
  const int64_t tiles = divide(params.groups + kGroups - 1, kGroups);
  const int64_t batch = divide(blockIdx.x, tiles), first_group = (blockIdx.x - batch * tiles) * kGroups;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const bool keys_are_close = params.scores.stride[1] == 1;  // else groups usually are
  with_stored(params.scores.dtype, [&](auto stored) {
    using Stored = typename decltype(stored)::type;
#pragma unroll 4
    for (int32_t i = threadIdx.x; i < row * kGroups; i += kThreads) {
      const int32_t group = keys_are_close ? i / kWarpSize % kGroups : i % kGroups;
      const int32_t key = keys_are_close ? i / kThreads * kWarpSize + i % kWarpSize : i / kGroups;
      if (key < keys && first_group + group < params.groups)
        table[group * row + key] = read<T, Stored>(params.scores.row(batch, key, first_group + group), 0);
    }
  });
  __syncthreads();
  if (first_group + warp >= params.groups) return;

  const T* const scores = table + warp * row;
  bool has_nan = false;
  for (int32_t key = lane; key < keys; key += kWarpSize) has_nan |= scores[key] != scores[key];
  has_nan = __any_sync(kAllLanes, has_nan);
  T threshold = std::numeric_limits<T>::quiet_NaN();
  const int64_t column = batch * params.groups + first_group + warp;
  int32_t* const expiry = params.expiry + column * keys;
  if (has_nan) {
    for (int32_t key = lane; key < keys; key += kWarpSize) expiry[key] = kNever;
  } else {
    const T soft = solve_sequence<SoftGate<T>>(scores, keys, params.num_keys, nearby + warp);
    typename HardGate<T>::Level hard = 0;
    if (params.hard) hard = solve_sequence<HardGate<T>>(scores, keys, params.num_keys, nearby + warp);
    for (int32_t key = lane; key < keys; key += kWarpSize) {
      const T score = scores[key];
      const auto level = HardGate<T>::level(score, key);
      const bool seen =
          params.hard ? level > HardGate<T>::kLowest && level >= hard : score > soft || score == SoftGate<T>::kHighest;
      expiry[key] = seen ? kNever : 0;
    }
    threshold = min(soft, std::numeric_limits<T>::max());  // finite, as in outputs.cu
  }
  for (int64_t query = lane; query < params.queries; query += kWarpSize)
    params.threshold[column * params.queries + query] = threshold;
}

}  // namespace

template <typename T>
bool launch_sequences(const SequenceParams<T>& params, cudaStream_t stream) {
  const int64_t bytes = kGroups * row_size(params.keys) * sizeof(T);
  if (params.keys == 0 || bytes > kMaxBytes + kGroups * kWarpSize) return false;
  launch("solve_sequences", solve_sequences<T>, params.batch * ((params.groups + kGroups - 1) / kGroups), kThreads,
         kGroups * sizeof(NearbyMemory<HardGate<T>>) + bytes, stream, params);
  return true;
}

template bool launch_sequences(const SequenceParams<float>&, cudaStream_t);
template bool launch_sequences(const SequenceParams<double>&, cudaStream_t);

}  // namespace sparsek::cuda
