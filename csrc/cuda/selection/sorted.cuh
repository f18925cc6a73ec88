// Soft results of a run by binary search: the keys near it in ascending order, with sums of what comes before each.
#pragma once

#include "cuda/selection/gates.cuh"

namespace sparsek::cuda {

// Of one warp, in shared memory.
template <typename T>
struct NearbyMemory {
  static constexpr int kMaxOld = 96;  // keys that count for all results of the run
  unsigned __int128 sums[kMaxOld + 1];
  uint64_t own_fixed[kWarpSize];
  T old[kMaxOld];
  T own[kWarpSize];  // keys that enter during the run
};

// Keys lie less than 2 above the origin, but for own ones that are saturated or dropped throughout.
template <typename T>
class SortedNearby {
 public:
  __device__ SortedNearby(NearbyMemory<T>& memory, T origin)
      : memory_(memory), origin_(fixed_point(origin)), lane_(static_cast<int>(threadIdx.x % kWarpSize)) {}

  // Sorts memory.old [old_count], and the warp's `own_count` own keys, one per lane; the first `mine` of these, in the
  // order of the lanes, count for this lane's result. All lanes together.
  __device__ void sort(int old_count, T own, int own_count, int mine) {
    old_count_ = old_count;
    own_count_ = own_count;
    sort_old();
    sum_old();
    // Which of the sorted own keys are there.
    int rank = 0;
    for (int i = 0; i < own_count; ++i) {
      const T other = shuffle(own, i);
      rank += other < own || (other == own && i < lane_) ? 1 : 0;
    }
    uint32_t present = 0;
    if (lane_ < own_count) {
      memory_.own[rank] = own;
      memory_.own_fixed[rank] = fixed_point(own) - origin_;
      present = 1u << rank;
    }
#pragma unroll
    for (int offset = 1; offset < kWarpSize; offset *= 2) {
      const uint32_t other = __shfl_up_sync(kAllLanes, present, offset);
      present |= lane_ >= offset ? other : 0;
    }
    present = __shfl_sync(kAllLanes, present, mine > 0 ? mine - 1 : 0);
    present_ = mine > 0 ? present : 0;
    __syncwarp();
  }

  // The lowest level between low and high at which the gates sum to k, as SoftGate::solve.
  __device__ T solve(const typename SoftGate<T>::Settled& settled, T low, T high, int64_t num_keys,
                     float share_of_interval) const {
    const auto count = [&](T dropped_to, T saturated_from) {
      Census<T> census;
      census.start(settled, low, origin_);
      const auto is_dropped = [&](T key) { return key <= dropped_to; };
      const auto is_unsaturated = [&](T key) { return key < saturated_from; };
      const int first = partition<64>(memory_.old, old_count_, is_dropped);
      const int last = partition<64>(memory_.old, old_count_, is_unsaturated);
      if (first > 0) census.highest_dropped = higher_of(low, memory_.old[first - 1]);
      if (last < old_count_) census.lowest_saturated = memory_.old[last];
      if (first < last) {
        census.lowest = lower_of(census.lowest, memory_.old[first]);
        census.highest = memory_.old[last - 1];
        census.sum += static_cast<__int128>(memory_.sums[last] - memory_.sums[first]);
      }
      census.fractional += last - first;
      census.saturated += old_count_ - last;

      const uint32_t dropped = present_ & up_to(partition<32>(memory_.own, own_count_, is_dropped));
      const uint32_t unsaturated = present_ & up_to(partition<32>(memory_.own, own_count_, is_unsaturated));
      const uint32_t saturated = present_ & ~unsaturated, fractional = unsaturated & ~dropped;
      if (dropped != 0) census.highest_dropped = higher_of(census.highest_dropped, memory_.own[31 - __clz(dropped)]);
      if (saturated != 0)
        census.lowest_saturated = lower_of(census.lowest_saturated, memory_.own[__ffs(saturated) - 1]);
      census.saturated += __popc(saturated);
      census.fractional += __popc(fractional);
      if (fractional != 0) {
        census.lowest = lower_of(census.lowest, memory_.own[__ffs(fractional) - 1]);
        census.highest = higher_of(census.highest, memory_.own[31 - __clz(fractional)]);
        unsigned __int128 sum = 0;
        for (uint32_t left = fractional; left != 0; left &= left - 1) sum += memory_.own_fixed[__ffs(left) - 1];
        census.sum += static_cast<__int128>(sum);
      }
      return census;
    };
    return find_root(count, low, high, guess_between(low, high, share_of_interval), num_keys);
  }

 private:
  static constexpr int kOldOfLane = NearbyMemory<T>::kMaxOld / kWarpSize;

  __device__ static T shuffle(T x, int lane) { return __shfl_sync(kAllLanes, x, lane); }
  __device__ static uint32_t up_to(int count) { return count >= 32 ? ~0u : (1u << count) - 1; }

  // How many of the first keys [count] satisfy what no later one does. kStep: a power of two, at least half the count.
  template <int kStep, typename Is>
  __device__ static int partition(const T* keys, int count, const Is& is) {
    int found = 0;
#pragma unroll
    for (int step = kStep; step > 0; step /= 2)
      if (found + step <= count && is(keys[found + step - 1])) found += step;
    return found;
  }

  __device__ void sort_old() const {
    T keys[kOldOfLane];
    int ranks[kOldOfLane] = {};
#pragma unroll
    for (int j = 0; j < kOldOfLane; ++j) {
      const int index = lane_ + j * kWarpSize;
      keys[j] = index < old_count_ ? memory_.old[index] : SoftGate<T>::kHighest;
    }
#pragma unroll 4
    for (int i = 0; i < old_count_; ++i) {
      const T other = memory_.old[i];
#pragma unroll
      for (int j = 0; j < kOldOfLane; ++j)
        ranks[j] += other < keys[j] || (other == keys[j] && i < lane_ + j * kWarpSize) ? 1 : 0;
    }
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kOldOfLane; ++j)
      if (lane_ + j * kWarpSize < old_count_) memory_.old[ranks[j]] = keys[j];
    __syncwarp();
  }

  // Limbs of 22 bits leave room for the sum of 2^10.
  __device__ void sum_old() const {
    constexpr int kBits = 22, kLimbs = 3;
    uint32_t before[kLimbs] = {};
    if (lane_ == 0) memory_.sums[0] = 0;
#pragma unroll 1
    for (int base = 0; base < old_count_; base += kWarpSize) {
      const int i = base + lane_;
      const uint64_t fixed = i < old_count_ ? fixed_point(memory_.old[i]) - origin_ : 0;
      unsigned __int128 sum = 0;
#pragma unroll
      for (int l = 0; l < kLimbs; ++l) {
        uint32_t limb = static_cast<uint32_t>(fixed >> l * kBits) & ((1 << kBits) - 1);
#pragma unroll
        for (int offset = 1; offset < kWarpSize; offset *= 2) {
          const uint32_t other = __shfl_up_sync(kAllLanes, limb, offset);
          limb += lane_ >= offset ? other : 0;
        }
        limb += before[l];
        before[l] = __shfl_sync(kAllLanes, limb, kWarpSize - 1);
        sum += static_cast<unsigned __int128>(limb) << l * kBits;
      }
      if (i < old_count_) memory_.sums[i + 1] = sum;
    }
  }

  NearbyMemory<T>& memory_;
  const uint64_t origin_;
  const int lane_;
  int old_count_, own_count_;
  uint32_t present_;  // of memory.own: bit i for the i-th
};

}  // namespace sparsek::cuda
