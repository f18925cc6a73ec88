// A counting sort of each sequence's keys by the power of two below their lifetime, one CTA per sequence and group. Of
// the keys in a tile, none then lives for over twice as long as another, so that few pairs of a tile's are not seen.
#include "cuda/common/launch.cuh"
#include "cuda/simt/backward/passes.h"
#include "cuda/simt/tile.cuh"

namespace sparsek::cuda::simt {
namespace {

constexpr int kSorters = 1024;  // threads
constexpr int kWarps = kSorters / 32;
constexpr int kClasses = 32;

// The longest lifetimes are class 0, so that the longest work starts first; a key that no query sees is of the last
// one.
__device__ int class_of(const Sequence& sequence, bool causal, int32_t key, int32_t expiry) {
  const int32_t from = causal ? max(key, sequence.shift()) : 0;
  const int32_t to = causal ? min(expiry, sequence.keys) : expiry;
  return to > from ? __clz(to - from) - 1 : kClasses - 1;
}

template <typename T>
__global__ void __launch_bounds__(kSorters) order_keys(const __grid_constant__ BackwardParams<T> p) {
  __shared__ int32_t next[kClasses];                 // place of the next key of a class
  __shared__ int32_t warp_places[kWarps][kClasses];  // counts, then places, of the keys of one warp
  static_assert(kWarps * kClasses == kSorters && kClasses == 32, "each thread clears one count, each lane has a class");
  const Sequence sequence = p.sequences.at(blockIdx.x / p.groups);
  const int64_t first = (sequence.batch * p.groups + blockIdx.x % p.groups) * p.keys + sequence.key_begin;
  const int32_t* expiry = p.expiry + first;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const auto find_class = [&](int64_t key) {
    return class_of(sequence, p.pattern.causal, static_cast<int32_t>(key), expiry[key]);
  };

  if (warp == 0) next[lane] = 0;
  __syncthreads();
  for (int64_t key = thread; key < sequence.keys; key += kSorters) atomicAdd(&next[find_class(key)], 1);
  __syncthreads();
  if (warp == 0) {
    const int32_t count = next[lane];
    int32_t through = count;
    for (int offset = 1; offset < 32; offset *= 2) {
      const int32_t before = __shfl_up_sync(kAllLanes, through, offset);
      if (lane >= offset) through += before;
    }
    next[lane] = through - count;
  }
  for (int64_t base = 0; base < sequence.keys; base += kSorters) {
    const int64_t key = base + thread;
    const int mine = key < sequence.keys ? find_class(key) : -1;
    warp_places[warp][lane] = 0;
    __syncwarp();
    const unsigned alike = __match_any_sync(kAllLanes, mine);
    const int rank = __popc(alike & ((1u << lane) - 1));
    if (mine >= 0 && rank == 0) warp_places[warp][mine] = __popc(alike);
    __syncthreads();
    if (warp == 0) {
      int32_t place = next[lane];
      for (int w = 0; w < kWarps; ++w) {
        const int32_t count = warp_places[w][lane];
        warp_places[w][lane] = place;
        place += count;
      }
      next[lane] = place;
    }
    __syncthreads();
    if (mine >= 0) p.order[first + warp_places[warp][mine] + rank] = static_cast<int32_t>(key);
    __syncwarp();
  }
}

}  // namespace

template <typename T>
void run_order(const BackwardParams<T>& params, cudaStream_t stream) {
  launch("order_keys", order_keys<T>, params.sequences.count * params.groups, kSorters, 0, stream, params);
}

template void run_order(const BackwardParams<float>&, cudaStream_t);
template void run_order(const BackwardParams<double>&, cudaStream_t);

}  // namespace sparsek::cuda::simt
