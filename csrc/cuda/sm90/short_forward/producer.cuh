// The producer: a warpgroup that lists the keys of each job and brings their rows, and the queries, to shared memory.
#pragma once

#include <cfloat>

#include "cuda/common/elements.cuh"
#include "cuda/sm90/ptx.cuh"
#include "cuda/sm90/short_forward/traits.cuh"
#include "cuda/sm90/units.cuh"

namespace sparsek::cuda::sm90 {

template <typename Traits>
class ShortProducer {
 public:
  __device__ ShortProducer(const ShortForwardArguments& a, typename Traits::Shared& shared)
      : a_(a),
        p_(a.params),
        s_(shared),
        warp_(static_cast<int>(threadIdx.x) / 32),
        lane_(threadIdx.x % 32),
        keys_(a.params.key),
        values_(a.params.value) {}

  __device__ void run() {
    Ring<2> job;
    for (int64_t index = blockIdx.x; index < a_.jobs; index += gridDim.x, job.advance()) {
      const int64_t pack = divide(index, a_.splits), key_head = divide(pack, a_.packs);
      batch_ = static_cast<int32_t>(divide(key_head, p_.groups));
      group_ = static_cast<int32_t>(key_head - batch_ * p_.groups);
      const float threshold = p_.threshold[key_head * p_.queries];  // that of all queries
      const int32_t units = list(threshold);
      head_ = static_cast<int32_t>(group_ * p_.heads_per_group + ((pack - key_head * a_.packs) << a_.log_heads));
      const int64_t begin = (index - pack * a_.splits) * a_.job_rows;
      query_ = static_cast<int32_t>(begin >> a_.log_heads);
      const int32_t rows = static_cast<int32_t>(min(a_.job_rows, a_.rows - begin));
      if (threadIdx.x == 0) {
        barrier_wait(s_.job_empty[job.place], job.phase ^ 1);
        const int64_t row = (int64_t{batch_} * p_.groups * p_.heads_per_group + head_) * p_.queries + query_;
        s_.jobs[job.place] = {batch_, head_, query_, rows, units, threshold, p_.lse + row};
        barrier_arrive(s_.job_full[job.place]);
      }
      for (int32_t row = 0; row < rows; row += Traits::kRows) {
        bool has_queries = threadIdx.x != 0;                                     // one thread brings them
        const int32_t needed = row > 0 && units <= Traits::kStages ? 0 : units;  // else they have stayed
        for (int32_t unit = 0; unit < needed; ++unit) {
          // Queries come once there is no room for keys: it may be long until there is room for these.
          if (!has_queries && !barrier_test(s_.empty[unit_.place], unit_.phase ^ 1))
            load_queries(row), has_queries = true;
          load_unit(unit);
        }
        if (!has_queries) load_queries(row);
      }
    }
  }

 private:
  // Lists the keys with gates above 0, in ascending order, and fills up the last unit with the first of them, by a gate
  // of 0. Returns how many units there are; none where the threshold is NaN.
  __device__ int32_t list(float threshold) {
    constexpr int kPerThread = 4;
    const int32_t count = static_cast<int32_t>(p_.keys);
    const int32_t* const expiry = p_.expiry + (int64_t{batch_} * p_.groups + group_) * p_.keys;
    const char* const column = a_.columns.row(batch_, 0, group_);
    const float bound = fminf(threshold, FLT_MAX);  // pinned keys, of score +inf, stay above it
    int32_t listed = 0, first_listed = kNever;
    named_barrier_sync(kListBarrier, 128);  // the list before has been read
    int turn = 0;
    for (int32_t base = 0; base < count; base += 128 * kPerThread, turn ^= 1) {
      const int32_t begin = base + warp_ * (32 * kPerThread) + lane_;
      float gates[kPerThread];
      if (p_.pattern.hard) {  // a key is seen by all or by nobody
#pragma unroll
        for (int i = 0; i < kPerThread; ++i)
          gates[i] = begin + 32 * i < count && expiry[begin + 32 * i] == kNever ? 1.0f : 0.0f;
      } else {
        with_stored(a_.columns.dtype, [&](auto stored) {
          using Stored = typename decltype(stored)::type;
#pragma unroll
          for (int i = 0; i < kPerThread; ++i) {
            const int32_t key = begin + 32 * i;
            gates[i] = key < count ? read<float, Stored>(column, key * a_.columns.stride[1]) : -INFINITY;
          }
#pragma unroll
          for (int i = 0; i < kPerThread; ++i) gates[i] -= bound;
        });
      }
      uint32_t votes[kPerThread];
      int32_t mine = 0, first = kNever;
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        votes[i] = __ballot_sync(~0u, gates[i] > 0.0f && threshold == threshold);
        if (mine == 0 && votes[i] != 0) first = begin - lane_ + 32 * i + __ffs(votes[i]) - 1;
        mine += __popc(votes[i]);
      }
      if (lane_ == 0) s_.found[turn][warp_] = {mine, first};
      named_barrier_sync(kListBarrier, 128);  // one a turn: the other half is free by the next
      const int2 found = lane_ < 4 ? s_.found[turn][lane_] : int2{0, kNever};
      int32_t slot = listed + __reduce_add_sync(~0u, lane_ < warp_ ? found.x : 0);
      listed += __reduce_add_sync(~0u, found.x);
      first_listed = min(first_listed, __reduce_min_sync(~0u, found.y));
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        const int32_t place = slot + __popc(votes[i] & ((1u << lane_) - 1));
        if (votes[i] >> lane_ & 1) {
          s_.list_key[place] = begin + 32 * i;
          s_.list_bias[place] = gates[i] < 1.0f ? __log2f(gates[i]) : 0.0f;
        }
        slot += __popc(votes[i]);
      }
    }
    const int32_t units = (listed + Traits::kSlots - 1) / Traits::kSlots;
    const int32_t padding = listed + static_cast<int32_t>(threadIdx.x);
    if (padding < units * Traits::kSlots) {
      s_.list_key[padding] = first_listed;
      s_.list_bias[padding] = -INFINITY;
    }
    named_barrier_sync(kListBarrier, 128);
    return units;
  }

  __device__ void load_unit(int32_t unit) {
    const int32_t first = unit * Traits::kSlots;
    barrier_wait(s_.empty[unit_.place], unit_.phase ^ 1);
    if (threadIdx.x < Traits::kSlots) {
      const int slot = threadIdx.x;
      const float bias = s_.list_bias[first + slot];
      const bool solid = __all_sync(~0u, bias == 0.0f);
      s_.bias[unit_.place].column[slot / 2 % 4][slot / 8 * 2 + slot % 2] = bias;
      if (lane_ == 0) s_.bias[unit_.place].solid[warp_] = solid;
    }
    const int32_t* const keys = s_.list_key + first + warp_ * kCopied;
    keys_.copy(keys, true, p_.key.row(batch_, 0, group_), shared_address(s_.key[unit_.place]));
    values_.copy(keys, true, p_.value.row(batch_, 0, group_), shared_address(s_.value[unit_.place]));
    barrier_arrive_after_copies(s_.full[unit_.place]);
    barrier_arrive_as_warp(s_.full[unit_.place], lane_);  // for the bias
    unit_.advance();
  }

  // The tiles of all consumers, from `row` on; by one thread.
  __device__ void load_queries(int32_t row) {
    constexpr uint32_t kColumn = Traits::kTileRows * 128;  // bytes
#pragma unroll 1
    for (int consumer = 0; consumer < Traits::kConsumers; ++consumer, row += Traits::kTileRows) {
      uint64_t& full = s_.query_full[consumer][tile_.place];
      barrier_wait(s_.query_empty[consumer][tile_.place], tile_.phase ^ 1);
      barrier_expect(full, kColumn * (Traits::kWidth / 64));
      for (int column = 0; column < Traits::kWidth; column += 64)
        load_tile(shared_address(s_.query[consumer][tile_.place][column / 64]), &a_.queries, column, head_,
                  query_ + (row >> a_.log_heads), batch_, full);
      barrier_arrive(full);
    }
    tile_.advance();
  }

  static constexpr int kCopied = Traits::kSlots / 4;  // rows of a unit that a warp copies
  using Copier = RowCopier<typename Traits::Element, Traits::kWidth, Traits::kSlots, kCopied>;

  const ShortForwardArguments& a_;
  const ForwardParams<float>& p_;
  typename Traits::Shared& s_;
  const int warp_, lane_;
  const Copier keys_, values_;
  // The job.
  int32_t batch_, group_;
  int32_t head_;   // first query head
  int32_t query_;  // of the first row
  Ring<Traits::kStages> unit_;
  Ring<Traits::kQueryStages> tile_;
};

}  // namespace sparsek::cuda::sm90
