// Appends a token to the caches of all heads, a CTA for each.
#include <limits>

#include "common/pattern.h"
#include "cuda/append/params.h"
#include "cuda/common/elements.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/selection/sequence.cuh"

namespace sparsek::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kRoom = 512;  // for keys near the threshold

// A slot that the next key may take: the lowest score goes first, empty slots before all, the latest key among equals.
template <typename T>
struct Victim {
  T score = std::numeric_limits<T>::infinity();
  int32_t position = -1;
  int32_t slot = 0;

  __device__ bool goes_before(const Victim& other) const {
    if (score != other.score) return score < other.score;
    if (position != other.position) return position > other.position;
    return slot < other.slot;
  }
};

template <typename T>
__device__ Victim<T> first_of_warp(Victim<T> mine) {
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
    const Victim<T> other{__shfl_xor_sync(kAllLanes, mine.score, mask), __shfl_xor_sync(kAllLanes, mine.position, mask),
                          __shfl_xor_sync(kAllLanes, mine.slot, mask)};
    if (other.goes_before(mine)) mine = other;
  }
  return mine;
}

template <typename T>
struct alignas(16) AppendShared {  // before the candidates
  NearbyMemory<SoftGate<T>> nearby;
  Victim<T> victims[kWarps];
  alignas(16) char scratch[BlockGroup<kThreads>::kScratch];
  T list[kRoom];
  T found;
};

// The first of all threads' victims, for all of them.
template <typename T>
__device__ Victim<T> first_of_block(Victim<T> mine, Victim<T>* warps) {
  __syncthreads();  // `warps` may still be read
  mine = first_of_warp(mine);
  if (threadIdx.x % kWarpSize == 0) warps[threadIdx.x / kWarpSize] = mine;
  __syncthreads();
  mine = warps[threadIdx.x % kWarps];
  return first_of_warp(mine);
}

__device__ void copy_row(char* to, const char* from, int64_t bytes) {
  for (int64_t i = 2 * threadIdx.x; i < bytes; i += 2 * kThreads)
    *reinterpret_cast<uint16_t*>(to + i) = *reinterpret_cast<const uint16_t*>(from + i);
}

template <typename T>
__device__ T read_score(const Rows& columns, int64_t batch, int64_t group) {
  T score;
  with_stored(columns.dtype,
              [&](auto stored) { score = read<T, typename decltype(stored)::type>(columns.row(batch, 0, group), 0); });
  return score;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) append_token(const __grid_constant__ AppendParams<T> p) {
  constexpr T kPinned = std::numeric_limits<T>::infinity(), kNone = -kPinned;
  auto& shared = shared_memory<AppendShared<T>>();
  BlockGroup<kThreads> block{static_cast<int>(threadIdx.x), shared.scratch};
  T* const candidates = reinterpret_cast<T*>(&shared + 1);  // [slots]
  const Cache<T>& c = p.cache;
  const int32_t slots = static_cast<int32_t>(c.slots);
  const int64_t head = blockIdx.x, batch = head / p.groups, group = head - batch * p.groups;
  const int64_t places = c.slots + c.window;
  char *const keys = c.key + head * places * c.key_bytes, *const values = c.value + head * places * c.value_bytes;
  T* const scores = c.score + head * places;
  int32_t *const positions = c.position + head * c.slots, *const expiry = p.expiry + head * places;
  const char *const key = p.key.row(batch, 0, group), *const value = p.value.row(batch, 0, group);
  const T fresh = read_score<T>(p.columns, batch, group);
  const int64_t length = c.length[head];
  const int32_t next = c.next[head];

  // The key that becomes a candidate takes its slot, and the new one its place in the ring.
  const int64_t place = c.window > 0 ? length % c.window : 0, row = c.slots + place;
  T& waiting = c.waiting[c.window > 0 ? head * c.window + place : 0];
  const bool from_ring = c.window > 0;
  const T score = from_ring ? (length >= c.window ? waiting : kNone) : fresh;
  const bool enters = score != kNone;
  const bool overflows = scores[next] > kNone;  // what found no room goes, now that its query has seen it
  if (enters) {
    copy_row(keys + next * c.key_bytes, from_ring ? keys + row * c.key_bytes : key, c.key_bytes);
    copy_row(values + next * c.value_bytes, from_ring ? values + row * c.value_bytes : value, c.value_bytes);
  }
  bool has_nan = false;
  for (int32_t slot = threadIdx.x; slot < slots; slot += kThreads) {
    const T mine = slot == next ? score : scores[slot];
    candidates[slot] = mine;
    has_nan |= mine != mine;
  }
  has_nan = __syncthreads_or(has_nan);  // and all have read what is written now
  if (from_ring) {
    copy_row(keys + row * c.key_bytes, key, c.key_bytes);
    copy_row(values + row * c.value_bytes, value, c.value_bytes);
  }
  if (threadIdx.x == 0) {
    if (from_ring) {
      waiting = fresh;
      scores[row] = kPinned;
    }
    if (enters) positions[next] = static_cast<int32_t>(length - c.window);
    if (overflows) ++c.overflow[head];
    c.length[head] = length + 1;
  }

  __syncthreads();

  // Who is not seen now is never seen again.
  T threshold = kNone;
  if (has_nan) {
    threshold = std::numeric_limits<T>::quiet_NaN();
  } else if (p.hard) {
    while (true) {
      uint32_t counts[2] = {0, 0};  // pinned and other keys
      Victim<T> last;
      for (int32_t slot = threadIdx.x; slot < slots; slot += kThreads) {
        const T mine = candidates[slot];
        if (mine == kNone) continue;
        ++counts[mine < kPinned];
        if (const Victim<T> other{mine, positions[slot], slot}; mine < kPinned && other.goes_before(last)) last = other;
      }
      block.sum(counts);
      last = first_of_block(last, shared.victims);
      if (counts[1] <= max(p.num_keys - counts[0], int64_t{0})) break;
      if (threadIdx.x == 0) candidates[last.slot] = kNone;
      __syncthreads();
    }
  } else {
    const T soft =
        solve_sequence<SoftGate<T>>(block, candidates, slots, p.num_keys, shared.list, kRoom, &shared.nearby);
    if (threadIdx.x == 0) shared.found = soft;
    __syncthreads();
    for (int32_t slot = threadIdx.x; slot < slots; slot += kThreads)
      if (!(candidates[slot] > shared.found) && candidates[slot] != kPinned) candidates[slot] = kNone;
    threshold = min(shared.found, std::numeric_limits<T>::max());  // finite, as in selection/outputs.cu
  }
  __syncthreads();

  Victim<T> first;
  for (int32_t slot = threadIdx.x; slot < slots; slot += kThreads) {
    const T mine = candidates[slot];
    scores[slot] = mine;
    expiry[slot] = mine == kNone ? 0 : kNever;
    const Victim<T> other{mine, mine == kNone ? slots - slot : positions[slot], slot};
    if (other.goes_before(first)) first = other;
  }
  first = first_of_block(first, shared.victims);
  for (int64_t r = threadIdx.x; r < c.window; r += kThreads) expiry[c.slots + r] = r <= length ? kNever : 0;
  if (threadIdx.x == 0) {
    c.next[head] = first.slot;
    p.threshold[head] = threshold;
  }
}

}  // namespace

template <typename T>
void launch_append(const AppendParams<T>& params, cudaStream_t stream) {
  launch("append_token", append_token<T>, params.batch * params.groups, kThreads,
         sizeof(AppendShared<T>) + params.cache.slots * sizeof(T), stream, params);
}

template void launch_append(const AppendParams<float>&, cudaStream_t);
template void launch_append(const AppendParams<double>&, cudaStream_t);

}  // namespace sparsek::cuda
