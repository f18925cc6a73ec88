// What a CTA works on: rows of queries, and the keys that they see.
#pragma once

#include <cfloat>

#include "cuda/common/elements.cuh"
#include "cuda/sm90/short_forward/traits.cuh"

namespace sparsek::cuda::sm90 {

// Rows of one pack of heads, at least one. All that is below is relative to the first of them.
struct ShortWork {
  int64_t batch, group;
  int64_t head;   // first query head
  int64_t query;  // of the first row
  int32_t rows;

  __device__ explicit ShortWork(const ShortForwardArguments& a) {
    const ForwardParams<float>& p = a.params;
    const int64_t pack = divide(blockIdx.x, a.splits), key_head = divide(pack, a.packs);
    batch = divide(key_head, p.groups);
    group = key_head - batch * p.groups;
    head = group * p.heads_per_group + ((pack - key_head * a.packs) << a.log_heads);
    const int64_t begin = (blockIdx.x - pack * a.splits) * a.split_rows;  // of a query's first head
    query = begin >> a.log_heads;
    rows = static_cast<int32_t>(min(a.split_rows, a.rows - begin));
  }
};

// The gates of the keys, kPerThread of them for each thread, 32 apart.
template <typename Traits>
class ShortGates {
 public:
  static constexpr int kPerThread = (Traits::kMaxKeys + Traits::kThreads - 1) / Traits::kThreads;

  // Starts the loads.
  __device__ ShortGates(const ShortForwardArguments& a, const ShortWork& work)
      : first_(static_cast<int>(threadIdx.x) / 32 * (32 * kPerThread) + static_cast<int>(threadIdx.x) % 32) {
    const ForwardParams<float>& p = a.params;
    const int64_t column = work.batch * p.groups + work.group;
    threshold_ = p.threshold[column * p.queries];  // that of all queries
    const int32_t keys = static_cast<int32_t>(p.keys);
    if (p.pattern.hard) {  // expiry is all or nothing
      const int32_t* expiry = p.expiry + column * p.keys;
#pragma unroll
      for (int i = 0; i < kPerThread; ++i)
        score_[i] = first_ + 32 * i < keys && expiry[first_ + 32 * i] == kNever ? INFINITY : -INFINITY;
      return;
    }
    const char* column_of_scores = a.columns.row(work.batch, 0, work.group);
    with_stored(a.columns.dtype, [&](auto stored) {
      using Stored = typename decltype(stored)::type;
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        const int32_t key = first_ + 32 * i;
        score_[i] = key < keys ? read<float, Stored>(column_of_scores, key * a.columns.stride[1]) : -INFINITY;
      }
    });
  }

  // NaN: out and LSE are NaN, and no key is listed.
  __device__ float threshold() const { return threshold_; }

  // Lists the keys with gates above 0, in ascending order, and fills up the last unit with the first of them, by a gate
  // of 0. Returns how many units there are. For all threads together.
  __device__ int32_t list(typename Traits::Shared& s) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const float threshold = fminf(threshold_, FLT_MAX);  // pinned keys, of score +inf, stay above it
    uint32_t votes[kPerThread];
    int32_t count = 0, first_key = kNever;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      votes[i] = __ballot_sync(~0u, score_[i] > threshold && threshold_ == threshold_);
      if (count == 0 && votes[i] != 0) first_key = first_ - lane + 32 * i + __ffs(votes[i]) - 1;
      count += __popc(votes[i]);
    }
    if (lane == 0) s.found[warp] = {count, first_key};
    __syncthreads();
    const int2 found = lane < Traits::kWarps ? s.found[lane] : int2{0, kNever};
    int32_t slot = __reduce_add_sync(~0u, lane < warp ? found.x : 0);
    const int32_t total = __reduce_add_sync(~0u, found.x);
    first_key = __reduce_min_sync(~0u, found.y);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int32_t mine = slot + __popc(votes[i] & ((1u << lane) - 1));
      if (votes[i] >> lane & 1) {
        s.keys[mine] = first_ + 32 * i;
        const float gate = score_[i] - threshold;
        s.bias[mine] = gate < 1.0f ? __log2f(gate) : 0.0f;
      }
      slot += __popc(votes[i]);
    }
    const int32_t units = (total + Traits::kSlots - 1) / Traits::kSlots;
    const int32_t padding = total + static_cast<int32_t>(threadIdx.x);
    if (padding < units * Traits::kSlots) {
      s.keys[padding] = first_key;
      s.bias[padding] = -INFINITY;
    }
    __syncthreads();
    return units;
  }

 private:
  const int32_t first_;  // key of this thread
  float threshold_;
  float score_[kPerThread];
};

}  // namespace sparsek::cuda::sm90
