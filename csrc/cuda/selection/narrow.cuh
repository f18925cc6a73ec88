// Bounds of the levels of a run of positions, from approximate sums.
#pragma once

#include "cuda/selection/gates.cuh"

namespace sparsek::cuda {

// How far sums may be off, and how close is close enough: both in keys.
template <typename Real>
struct Accuracy {
  Real margin;
  Real tolerance;
  Real unit;  // threads round their sums to multiples of it, so that integers add up
  Real per_unit;

  // A thread adds up count / threads gates one after the other, each of them off by less than 2^-25.
  __device__ static Accuracy of(Real num_keys, Real count, int threads, Real tolerance) {
    const Real margin = Real(6e-8) * ((count / threads + 16) * num_keys + 16 * count);
    const Real unit = (count + 1) / (1 << 29);
    return {margin, tolerance > 4 * margin ? tolerance : 4 * margin, unit, 1 / unit};
  }
};

// Sums of gates at two levels, over the threads of a group.
template <typename Real>
struct MassPair {
  Mass<Real> first, second;

  template <typename Group>
  __device__ void sum(Group& group, const Accuracy<Real>& accuracy) {
    const Real unit = accuracy.unit, per_unit = accuracy.per_unit;
    uint32_t sums[4] = {static_cast<uint32_t>(first.kept * per_unit), static_cast<uint32_t>(first.slope),
                        static_cast<uint32_t>(second.kept * per_unit), static_cast<uint32_t>(second.slope)};
    group.sum(sums);
    first = {sums[0] * unit, static_cast<Real>(sums[1])};
    second = {sums[2] * unit, static_cast<Real>(sums[3])};
  }
};

// One end of an interval on its way: the gates' sum is surely too large at `low`, for the lower end, or too small at
// `high`, for the upper one.
template <typename Gate>
struct End {
  using Level = typename Gate::Level;
  using Real = typename Gate::Real;
  Level low, high, at;
  bool open;

  template <bool kUpper>
  __device__ void move(const Mass<Real>& mass, Real budget, Accuracy<Real> accuracy, bool halve) {
    if (!open) return;
    const Real excess = kUpper ? budget - mass.kept : mass.kept - budget;
    const bool certain = excess > accuracy.margin;
    (certain == kUpper ? high : low) = at;
    if (certain && excess <= 2 * accuracy.tolerance) {
      open = false;
      return;
    }
    const Real aim = kUpper ? accuracy.tolerance - excess : excess - accuracy.tolerance;
    const Level next = Gate::newton(at, aim, mass.slope);
    at = !halve && next > low && next < high ? next : Gate::middle(low, high);
    open = at > low && at < high;
  }
};

// Raises `low` to a lower bound of the level after the keys that masses(a, b)[0] sums over at level a, and lowers
// `high` to an upper bound of that after those of masses(a, b)[1] at level b; each only if asked to. Both must be
// bounds already, and whatever happens they stay bounds. The search begins at `start`, if that lies in between.
template <typename Gate, typename Masses>
__device__ void narrow(const Masses& masses, typename Gate::Real budget, Accuracy<typename Gate::Real> accuracy,
                       bool from_low, bool from_high, typename Gate::Level start, typename Gate::Level& low,
                       typename Gate::Level& high) {
  constexpr int kMaxSteps = 40;
  if (!(start > low && start < high)) start = low;
  End<Gate> lower{low, high, start, from_low}, upper{low, high, start, from_high};
  for (int step = 1; step <= kMaxSteps && (lower.open || upper.open); ++step) {
    const auto mass = masses(lower.at, upper.at);
    const bool halve = step % 6 == 0;  // Newton's steps may be short
    lower.template move<false>(mass.first, budget, accuracy, halve);
    upper.template move<true>(mass.second, budget, accuracy, halve);
  }
  if (from_low) low = lower.low;
  if (from_high) high = upper.high;
}

}  // namespace sparsek::cuda
