// Soft and hard gates: how much of a key is kept at a level, and the exact level that keeps k.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "common/fixed_point.h"
#include "cuda/selection/group.cuh"
#include "cuda/selection/params.h"

namespace sparsek::cuda {

// A run of keys: their levels, or the scores of a sequence from its first key on.
template <typename Gate>
struct Keys {
  using Level = typename Gate::Level;
  using Score = typename Gate::Score;
  const Level* levels = nullptr;
  const Score* scores = nullptr;

  __device__ static Keys of_levels(const Level* levels) { return {levels, nullptr}; }
  __device__ static Keys of_scores(const Score* scores) {
    if constexpr (std::is_same_v<Level, Score>) return {scores, nullptr};
    return {nullptr, scores};
  }

  __device__ Level operator[](int32_t i) const {
    if constexpr (std::is_same_v<Level, Score>) return levels[i];
    return levels != nullptr ? levels[i] : Gate::level(scores[i], i);
  }
};

// The keys that matter to one position, but for those whose state is known.
template <typename Gate>
struct Nearby {
  Keys<Gate> keys;
  int32_t count;
  const uint64_t* units;  // [count] keys as to_plain gives them, where all are plain, or in fixed point; or null
  bool plain;
};

template <typename Real>
struct Mass {
  Real kept = 0;   // sum of the gates
  Real slope = 0;  // number of fractional ones, by which the sum falls per unit of the level
};

enum class State { kDropped, kActive, kFractional, kSaturated };

// Plain scores are multiples of 2^-50, and 1/2 apart or less: 64 bits hold sums of 2^11 differences below 2, which is
// faster than fixed point.
constexpr int kPlainBits = 50;
constexpr float kLowestPlain = 0x1p-27f;  // but for 0
__device__ inline bool is_plain(float score) {
  const float size = fabsf(score);
  return (size >= kLowestPlain && size < 0x1p23f) || size == 0;
}
__device__ inline bool is_plain(double) { return false; }
__device__ inline uint64_t to_plain(float score) {
  const int32_t bits = __float_as_int(score), size = score == 0 ? 0 : bits & 0x7fffff | 0x800000;
  return static_cast<uint64_t>(static_cast<int64_t>(bits < 0 ? -size : size))
         << ((bits >> 23 & 0xff) - 150 + kPlainBits & 63);
}
__device__ inline uint64_t to_plain(double) { return 0; }

// Of a score that plain ones are to be summed relative to: a plain score that is hardly lower.
__device__ inline float plain_origin(float score) {
  return fabsf(score) >= kLowestPlain ? score : score < 0 ? -kLowestPlain : 0;
}
__device__ inline double plain_origin(double score) { return score; }

// The sum of `count` plain scores less the origin, in fixed point.
template <typename T>
__device__ __int128 from_plain(uint64_t plain, int32_t count, T origin) {
  if (count == 0) return 0;
  return static_cast<__int128>(static_cast<int64_t>(plain - count * to_plain(origin))) << (62 - kPlainBits);
}

__device__ inline float round_down(double x, float) { return __double2float_rd(x); }
__device__ inline float round_up(double x, float) { return __double2float_ru(x); }
__device__ inline double round_down(double x, double) { return x; }
__device__ inline double round_up(double x, double) { return x; }
__device__ inline float saturate(float x) { return __saturatef(x); }
__device__ inline double saturate(double x) { return fmin(fmax(x, 0.0), 1.0); }

// Rough for float, where it only guides a search.
__device__ inline float quotient(float a, float b) { return __fdividef(a, b); }
__device__ inline double quotient(double a, double b) { return a / b; }

template <typename T>
struct SoftGate {
  using Score = T;
  using Real = T;  // of approximate sums
  using Level = T;
  static constexpr bool kHard = false;
  static constexpr T kHighest = std::numeric_limits<T>::infinity();  // pinned; as a result: only these are kept
  static constexpr T kLowest = -kHighest;                            // no candidate; as a result: all are kept

  __device__ static Level level(T score, int32_t) { return score; }
  __device__ static Real budget(int64_t num_keys) { return static_cast<Real>(num_keys); }
  // A level at which everything from `lowest` on is saturated.
  __device__ static Level below(Level lowest) { return nextafter(lowest - 1, kLowest); }
  __device__ static Level middle(Level low, Level high) { return low / 2 + high / 2; }
  __device__ static Level between(Level low, Level high, float share) { return low + (high - low) * share; }
  __device__ static Level newton(Level at, Real excess, Real slope) { return at + quotient(excess, slope); }

  __device__ static void add(Level key, Level at, Mass<Real>& mass) {
    const T gate = saturate(key - at);
    mass.kept += gate;
    mass.slope += gate > 0 && gate < 1 ? 1 : 0;
  }

  // For all levels from low to high. The differences round monotonically: what is called fractional or saturated is.
  __device__ static State state(Level key, Level low, Level high) {
    if (!(key > low)) return State::kDropped;
    if (key > high && key - low < 1) return State::kFractional;
    return key - high > 1 ? State::kSaturated : State::kActive;
  }

  // Keys that stay saturated or fractional throughout an interval of levels.
  struct Settled {
    __int128 sum = 0;       // of the fractional scores less the origin, in fixed point
    uint64_t plain = 0;     // of plain ones: not in `sum` until reduced
    int32_t num_plain = 0;  // of these
    Real total = 0;         // `sum` once reduced
    T origin = 0;
    T lowest = kHighest;  // fractional score
    int32_t fractional = 0;
    int32_t saturated = 0;

    __device__ void add(const Settled& other) {
      sum += other.sum;
      total += other.total;
      lowest = lower_of(lowest, other.lowest);
      fractional += other.fractional;
      saturated += other.saturated;
    }

    __device__ void count(Level key, State state) {
      if (state == State::kSaturated) ++saturated;
      if (state != State::kFractional) return;
      ++fractional;
      lowest = lower_of(lowest, key);
      if (is_plain(key)) {
        plain += to_plain(key);
        if (++num_plain == 1 << 11) add_plain();
      } else {
        sum += fixed_difference(key, origin);
      }
    }

    // Over the threads of a group. No score lies below the origin, and 2^9 threads sum up 22 bits in 32.
    template <typename Group>
    __device__ void reduce(Group& group) {
      constexpr int kBits = 22, kLimbs = 5;
      add_plain();
      uint32_t counts[2] = {static_cast<uint32_t>(fractional), static_cast<uint32_t>(saturated)};
      uint32_t limbs[kLimbs];
#pragma unroll
      for (int i = 0; i < kLimbs; ++i) limbs[i] = static_cast<uint32_t>(sum >> i * kBits) & ((1 << kBits) - 1);
      group.sum(counts);
      fractional = counts[0];
      saturated = counts[1];
      if (fractional == 0) return;
      group.sum(limbs);
      sum = 0;
#pragma unroll
      for (int i = 0; i < kLimbs; ++i) sum += static_cast<__int128>(limbs[i]) << i * kBits;
      total = static_cast<Real>(to_double(sum));
      Level highest = kLowest;
      group.bound(lowest, highest);
    }

    // What keys are counted on top of. With fractional keys the interval is narrower than 1, which leaves everything
    // fractional within 2 of the origin, as fixed point demands.
    __device__ static Settled none(T origin) {
      Settled settled;
      settled.origin = plain_origin(origin);
      return settled;
    }
    __device__ T origin_within(Level low) const { return fractional > 0 ? origin : low; }

    __device__ void add_plain() {
      sum += from_plain(plain, num_plain, origin);
      plain = 0;
      num_plain = 0;
    }

    __device__ void add_to(Level at, Mass<Real>& mass) const {
      mass.kept += saturated;
      if (fractional == 0) return;
      mass.kept += total - fractional * (at - origin);
      mass.slope += fractional;
    }
  };

  // The lowest level between low and high at which the gates sum to k, rounded down, but below all that it keeps.
  __device__ static Level solve(const Nearby<SoftGate>& nearby, const Settled& settled, Level low, Level high,
                                int64_t num_keys, float share_of_interval);
};

// Who is fractional at a level, and what borders on them.
template <typename T>
struct Census {
  int32_t saturated, fractional;
  T lowest = SoftGate<T>::kHighest, highest = SoftGate<T>::kLowest;  // fractional score
  T highest_dropped;
  T lowest_saturated = SoftGate<T>::kHighest;
};

// Of keys visited one by one.
template <typename T>
struct CountedCensus : Census<T> {
  __int128 sum;     // of the fractional scores less the origin, in fixed point
  uint64_t origin;  // in fixed point

  // The settled fractional scores, of which no other may be counted yet.
  __device__ void start(const typename SoftGate<T>::Settled& settled, T low, uint64_t origin_) {
    origin = origin_;
    this->saturated = settled.saturated;
    this->fractional = settled.fractional;
    this->lowest = settled.lowest;
    this->highest_dropped = low;
    sum = settled.sum +
          static_cast<__int128>(settled.fractional) * static_cast<int64_t>(fixed_point(settled.origin) - origin);
  }

  // Of the fractional gates' sum at the lowest fractional score, over `share`. The sign is exact.
  __device__ double excess(int64_t share) const {
    const __int128 above =
        sum - static_cast<__int128>(this->fractional) * static_cast<int64_t>(fixed_point(this->lowest) - origin);
    return to_double(above - (static_cast<__int128>(share) << 62));
  }
};

// From count(dropped_to, saturated_from), a census of the keys in between.
template <typename T, typename Count>
__device__ T find_root(const Count& count, double low, double high, T guess, int64_t num_keys) {
  constexpr int kMaxSteps = 256;
  double a = low, b = high, at = guess;
  bool last = false;  // a and b are next to each other
  for (int step = 0; step < kMaxSteps; ++step) {
    // For T = float the comparisons with these bounds are exact.
    const auto census = count(round_down(at, T()), round_up(at + 1, T()));
    const int32_t fractional = census.fractional;
    T lowest = census.lowest;
    const int64_t share = num_keys - census.saturated;  // what the fractional gates must sum to
    double root = census.highest_dropped;
    bool solved = last;
    if (share == fractional && (fractional == 0 || census.highest_dropped <= static_cast<double>(lowest) - 1)) {
      // Whole gates alone: of all levels between the dropped and the saturated keys, the lowest.
      solved = true;
      lowest = SoftGate<T>::kHighest;
    } else if (fractional > 0) {
      // Relative to the lowest fractional score: its own gate decides, by an exact sign, whether it is one.
      const double excess = census.excess(share);
      root = lowest + excess / fractional;
      solved |= excess < 0 && root >= census.highest_dropped &&
                root <= static_cast<double>(census.lowest_saturated) - 1 &&
                root >= static_cast<double>(census.highest) - 1;
      if (last && root < census.highest_dropped) root = census.highest_dropped;
    }
    if (solved || step + 1 == kMaxSteps) {
      T rounded = round_down(root, T());
      if (rounded >= lowest) rounded = nextafter(lowest, SoftGate<T>::kLowest);
      return rounded;
    }
    const bool too_low = fractional > 0 ? root > at : share < 0;
    (too_low ? a : b) = at;
    at = fractional > 0 && root > a && root < b ? root : a / 2 + b / 2;
    if (!(at > a && at < b)) {
      at = b;
      last = true;
    }
  }
  return guess;  // not reached
}

template <typename T>
__device__ T SoftGate<T>::solve(const Nearby<SoftGate>& nearby, const Settled& settled, T low, T high, int64_t num_keys,
                                float share_of_interval) {
  constexpr int kApproximateSteps = 2;
  T guess = between(low, high, share_of_interval);
  if (!(guess >= low && guess <= high)) guess = middle(low, high);
  T a = low, b = high;
  const Real budget_left = budget(num_keys) - settled.saturated;
  for (int step = 0; step < kApproximateSteps; ++step) {
    Mass<Real> mass;
    if (settled.fractional > 0) {
      mass.kept = settled.total - settled.fractional * (guess - settled.origin);
      mass.slope = settled.fractional;
    }
#pragma unroll 4
    for (int32_t i = 0; i < nearby.count; ++i) add(nearby.keys[i], guess, mass);
    const Real excess = mass.kept - budget_left;
    (excess > 0 ? a : b) = guess;
    const T next = newton(guess, excess, mass.slope);
    guess = next >= a && next <= b ? next : middle(a, b);
  }
  const auto count = [&](T dropped_to, T saturated_from) {
    CountedCensus<T> census;
    // Everything fractional lies within 2 of this origin, or is the same number.
    const T origin = plain_origin(dropped_to);
    census.start(settled, low, fixed_point(origin));
    const auto visit = [&](T key) {
      const bool is_dropped = !(key > dropped_to), is_saturated = key >= saturated_from;
      const bool is_fractional = !is_dropped && !is_saturated;
      census.fractional += is_fractional ? 1 : 0;
      census.saturated += is_saturated ? 1 : 0;
      census.highest_dropped = fmax(census.highest_dropped, is_dropped ? key : kLowest);
      census.lowest_saturated = fmin(census.lowest_saturated, is_saturated ? key : kHighest);
      census.lowest = fmin(census.lowest, is_fractional ? key : kHighest);
      census.highest = fmax(census.highest, is_fractional ? key : kLowest);
      return is_fractional;
    };
    if (nearby.plain) {
      uint64_t plain = 0;
#pragma unroll 4
      for (int32_t i = 0; i < nearby.count; ++i) plain += visit(nearby.keys.levels[i]) ? nearby.units[i] : 0;
      census.sum += from_plain(plain, census.fractional - settled.fractional, origin);
    } else {
#pragma unroll 1
      for (int32_t i = 0; i < nearby.count; ++i) {
        const T key = nearby.keys[i];
        const uint64_t fixed = nearby.units != nullptr ? nearby.units[i] : fixed_point(key);
        if (visit(key)) census.sum += static_cast<int64_t>(fixed - census.origin);
      }
    }
    return census;
  };
  return find_root(count, low, high, guess, num_keys);
}

template <typename T>
struct HardGate {
  using Score = T;
  using Real = T;
  using Level = sparsek::cuda::Level<T, true>;
  static constexpr bool kHard = true;
  static constexpr Level kLowest = 0;
  static constexpr Level kHighest = ~Level(0);

  __device__ static Level level(T score, int32_t key) {
    if (!(score > -std::numeric_limits<T>::infinity())) return kLowest;
    if (score == std::numeric_limits<T>::infinity()) return kHighest;
    return static_cast<Level>(ordered(score + T(0))) << 32 | ~static_cast<uint32_t>(key);  // + 0: -0 ties with 0
  }

  // Between the counts of the k-th highest level and of the one before.
  __device__ static Real budget(int64_t num_keys) { return static_cast<Real>(num_keys) - Real(0.5); }
  __device__ static Level below(Level lowest) { return lowest - 1; }
  __device__ static Level middle(Level low, Level high) { return low + (high - low) / 2; }
  __device__ static Level between(Level low, Level high, float) { return middle(low, high); }
  __device__ static Level newton(Level, Real, Real) { return kLowest; }  // counts have no slope: halves intervals
  __device__ static void add(Level key, Level at, Mass<Real>& mass) { mass.kept += key > at ? 1 : 0; }

  __device__ static State state(Level key, Level low, Level high) {
    return !(key > low) ? State::kDropped : key > high ? State::kSaturated : State::kActive;
  }

  struct Settled {
    int32_t saturated = 0;

    __device__ void add(const Settled& other) { saturated += other.saturated; }
    template <typename Group>
    __device__ void reduce(Group& group) {
      uint32_t counts[1] = {static_cast<uint32_t>(saturated)};
      group.sum(counts);
      saturated = counts[0];
    }
    __device__ void count(Level, State state) { saturated += state == State::kSaturated ? 1 : 0; }
    __device__ static Settled none(Level) { return {}; }
    __device__ Level origin_within(Level low) const { return low; }
    __device__ void add_to(Level, Mass<Real>& mass) const { mass.kept += saturated; }
  };

  // The k-th highest level.
  __device__ static Level solve(const Nearby<HardGate>& nearby, const Settled& settled, Level low, Level high,
                                int64_t num_keys, float) {
    while (low < high) {
      const Level at = middle(low, high);
      int64_t above = settled.saturated;
      Level lowest_above = high, highest_below = low;
#pragma unroll 1
      for (int32_t i = 0; i < nearby.count; ++i) {
        const Level key = nearby.keys[i];
        if (key > at) {
          ++above;
          lowest_above = lower_of(lowest_above, key);
        } else {
          highest_below = higher_of(highest_below, key);
        }
      }
      if (above == num_keys) return lowest_above;
      if (above == num_keys - 1) return highest_below;
      (above > num_keys ? low : high) = above > num_keys ? lowest_above : highest_below;
    }
    return low;
  }

 private:
  __device__ static uint32_t ordered(float score) {
    const uint32_t bits = __float_as_uint(score), sign = 1u << 31;
    return bits & sign ? ~bits : bits | sign;
  }
  __device__ static uint64_t ordered(double score) {
    const uint64_t bits = __double_as_longlong(score), sign = uint64_t{1} << 63;
    return bits & sign ? ~bits : bits | sign;
  }
};

}  // namespace sparsek::cuda
