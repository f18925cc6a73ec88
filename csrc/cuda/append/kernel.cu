// Appends a token to the caches of all heads, a CTA for each.
#include <limits>
#include <type_traits>

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
  int32_t slot = std::numeric_limits<int32_t>::max();

  __device__ bool goes_before(const Victim& other, const int32_t* positions) const {
    if (score != other.score) return score < other.score;
    if (score == -std::numeric_limits<T>::infinity() || slot == other.slot || other.is_none()) return slot < other.slot;
    return !is_none() && positions[slot] > positions[other.slot];
  }
  __device__ bool is_none() const { return slot == std::numeric_limits<int32_t>::max(); }
};

template <typename T>
__device__ Victim<T> first_of_warp(Victim<T> mine, const int32_t* positions) {
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
    const Victim<T> other{__shfl_xor_sync(kAllLanes, mine.score, mask), __shfl_xor_sync(kAllLanes, mine.slot, mask)};
    if (other.goes_before(mine, positions)) mine = other;
  }
  return mine;
}

// The first of all threads' victims, for all of them.
template <typename T>
__device__ Victim<T> first_of_block(Victim<T> mine, const int32_t* positions, Victim<T>* warps) {
  __syncthreads();  // `warps` may still be read
  mine = first_of_warp(mine, positions);
  if (threadIdx.x % kWarpSize == 0) warps[threadIdx.x / kWarpSize] = mine;
  __syncthreads();
  mine = warps[threadIdx.x % kWarps];
  return first_of_warp(mine, positions);
}

// How many keys have gates of 1 at a threshold, and how many, of what sum, gates between 0 and 1.
struct Cut {
  uint32_t whole, partial;
  double sum;
};

template <typename T>
struct alignas(16) AppendShared {  // before the candidates
  NearbyMemory<SoftGate<T>> nearby;
  Victim<T> victims[kWarps];
  Cut cuts[2][kWarps];
  alignas(16) char scratch[BlockGroup<kThreads>::kScratch];
  T list[kRoom];
  T found;
};

// The sum of all threads' cuts, for all of them; `warps` may not be those of the use before.
__device__ Cut sum_of_block(Cut mine, Cut* warps) {
  mine.whole = __reduce_add_sync(kAllLanes, mine.whole);
  mine.partial = __reduce_add_sync(kAllLanes, mine.partial);
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) mine.sum += __shfl_xor_sync(kAllLanes, mine.sum, mask);
  if (threadIdx.x % kWarpSize == 0) warps[threadIdx.x / kWarpSize] = mine;
  __syncthreads();
  Cut total{0, 0, 0.0};
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    total.whole += warps[w].whole;
    total.partial += warps[w].partial;
    total.sum += warps[w].sum;
  }
  return total;
}

// The soft threshold of candidates [slots], more than `num_keys`, by Newton's method from `start`, which is near it:
// where the gates' sum is linear, it is found exactly. False: not within a few steps. A token moves it by less than
// the distance to the next key or two, so two or three steps are the rule.
__device__ bool track_threshold(const float* candidates, int32_t slots, int64_t num_keys, float start,
                                Cut (&cuts)[2][kWarps], float& threshold) {
  constexpr int kSteps = 8;
  double level = start;
  Cut before{0, 0, 0.0};
  for (int step = 0; step < kSteps; ++step) {
    Cut cut{0, 0, 0.0};
#pragma unroll 4
    for (int32_t slot = threadIdx.x; slot < slots; slot += kThreads) {
      const double above = candidates[slot] - level;
      cut.whole += above >= 1.0;
      if (above > 0.0 && above < 1.0) ++cut.partial, cut.sum += above;
    }
    cut = sum_of_block(cut, cuts[step % 2]);
    // The same numbers of keys are the same keys, which `level` was computed for.
    if (step > 0 && cut.whole == before.whole && cut.partial == before.partial) {
      threshold = static_cast<float>(level);
      return true;
    }
    if (cut.partial == 0) return false;
    level += (cut.sum + cut.whole - static_cast<double>(num_keys)) / cut.partial;
    before = cut;
  }
  return false;
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
#pragma unroll 8
  for (int32_t slot = threadIdx.x; slot < slots; slot += kThreads) candidates[slot] = scores[slot];

  // The key that becomes a candidate takes its slot, and the new one its place in the ring.
  const bool has_ring = c.window > 0;
  const int64_t place = has_ring ? length % c.window : 0, row = c.slots + place;
  T& waiting = c.waiting[has_ring ? head * c.window + place : 0];
  const T score = has_ring ? (length >= c.window ? waiting : kNone) : fresh;
  const bool enters = score != kNone;
  for (int64_t i = 2 * threadIdx.x; i < c.key_bytes + c.value_bytes; i += 2 * kThreads) {
    const bool is_key = i < c.key_bytes;
    const int64_t bytes = is_key ? c.key_bytes : c.value_bytes, offset = is_key ? i : i - c.key_bytes;
    const auto at = [&](const char* rows, int64_t index) {
      return reinterpret_cast<uint16_t*>(const_cast<char*>(rows) + index * bytes + offset);
    };
    char* const cached = is_key ? keys : values;
    const uint16_t latest = *at(is_key ? key : value, 0);
    if (enters) *at(cached, next) = has_ring ? *at(cached, row) : latest;
    if (has_ring) *at(cached, row) = latest;
  }
  const bool mine_is_next = threadIdx.x == next % kThreads;
  bool overflows = false;
  if (mine_is_next) {
    overflows = candidates[next] > kNone;  // what found no room goes, now that its query has seen it
    candidates[next] = score;
  }
  uint32_t counts[3] = {0, 0, 0};  // all keys, pinned ones and NaN
  T lowest = kPinned, highest = kNone;
#pragma unroll 8
  for (int32_t slot = threadIdx.x; slot < slots; slot += kThreads) {
    const T mine = candidates[slot];
    counts[0] += mine > kNone;
    counts[1] += mine == kPinned;
    counts[2] += mine != mine;
    if (mine > kNone && slot != next) lowest = min(lowest, mine);  // all of those have been seen by the query before
  }
  block.sum(counts);  // and all have read what is written now
  if (mine_is_next) {
    if (has_ring) {
      waiting = fresh;
      scores[row] = kPinned;
    }
    if (enters) positions[next] = static_cast<int32_t>(length - c.window);
    if (overflows) ++c.overflow[head];
    c.length[head] = length + 1;
  }

  // Who is not seen now is never seen again.
  T threshold = kNone;
  if (counts[2] > 0) {
    threshold = std::numeric_limits<T>::quiet_NaN();
  } else if (p.hard) {
    while (true) {
      uint32_t kept[2] = {0, 0};  // pinned and other keys
      Victim<T> last;
      for (int32_t slot = threadIdx.x; slot < slots; slot += kThreads) {
        const T mine = candidates[slot];
        if (mine == kNone) continue;
        ++kept[mine < kPinned];
        if (const Victim<T> other{mine, slot}; mine < kPinned && other.goes_before(last, positions)) last = other;
      }
      block.sum(kept);
      last = first_of_block(last, positions, shared.victims);
      if (kept[1] <= max(p.num_keys - kept[0], int64_t{0})) break;
      if (threadIdx.x == 0) candidates[last.slot] = kNone;
      __syncthreads();
    }
  } else {
    T soft;
    bool tracked = false;
    if constexpr (std::is_same_v<T, float>) {  // sums in double are exact enough for float alone
      if (counts[0] > p.num_keys && counts[1] < p.num_keys) {
        block.bound(lowest, highest);
        tracked = track_threshold(candidates, slots, p.num_keys, lowest, shared.cuts, soft);
      }
    }
    if (!tracked) {
      soft = solve_sequence<SoftGate<T>>(block, candidates, slots, p.num_keys, shared.list, kRoom, &shared.nearby);
      if (threadIdx.x == 0) shared.found = soft;
      __syncthreads();
      soft = shared.found;
    }
    for (int32_t slot = threadIdx.x; slot < slots; slot += kThreads)
      if (!(candidates[slot] > soft) && candidates[slot] != kPinned) candidates[slot] = kNone;
    threshold = min(soft, std::numeric_limits<T>::max());  // finite, as in selection/outputs.cu
  }
  __syncthreads();

  Victim<T> first;
#pragma unroll 4
  for (int32_t slot = threadIdx.x; slot < slots; slot += kThreads) {
    const T mine = candidates[slot];
    scores[slot] = mine;
    expiry[slot] = mine == kNone ? 0 : kNever;
    if (const Victim<T> other{mine, slot}; other.goes_before(first, positions)) first = other;
  }
  first = first_of_block(first, positions, shared.victims);
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
