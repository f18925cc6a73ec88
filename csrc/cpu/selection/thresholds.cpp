#include "cpu/selection/thresholds.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <utility>
#include <vector>

#include "common/fixed_point.h"

namespace sparsek::cpu {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Scores with the lowest on top.
class LowestFirst {
 public:
  bool empty() const { return scores_.empty(); }
  int64_t size() const { return static_cast<int64_t>(scores_.size()); }
  double lowest() const { return empty() ? kInfinity : scores_.front(); }

  void push(double score) {
    scores_.push_back(score);
    std::push_heap(scores_.begin(), scores_.end(), std::greater<>());
  }

  double pop() {
    std::pop_heap(scores_.begin(), scores_.end(), std::greater<>());
    const double score = scores_.back();
    scores_.pop_back();
    return score;
  }

  void clear() { scores_.clear(); }

 protected:
  std::vector<double> scores_;
};

// The same with their sum. All are close to each other when the sum matters, so that it is kept relative to one of
// them, and exactly: what other devices find is the same to the bit.
class SummedLowestFirst : public LowestFirst {
 public:
  // The sum of the scores less the lowest one, over `share`.
  double excess(int64_t share) const {
    const __int128 above = sum_ - static_cast<__int128>(size()) * fixed_difference(lowest(), origin_);
    return to_double(above - (static_cast<__int128>(share) << 62));
  }

  void push(double score) {
    if (empty()) origin_ = score;
    LowestFirst::push(score);
    sum_ += fixed_difference(score, origin_);
  }

  double pop() {
    const double score = LowestFirst::pop();
    sum_ -= fixed_difference(score, origin_);
    if (!empty() && lowest() - origin_ > 0.5) {  // differences stay below 2
      sum_ -= static_cast<__int128>(size()) * fixed_difference(lowest(), origin_);
      origin_ = lowest();
    }
    return score;
  }

  void clear() {
    LowestFirst::clear();
    sum_ = 0;
  }

 private:
  double origin_ = 0;
  __int128 sum_ = 0;  // of the scores less the origin, in fixed point
};

// The projection onto the capped simplex of a growing set of scores. One more candidate can only raise the threshold,
// so a candidate goes from saturated (gate 1) to fractional to dropped (gate 0), and never back.
class SoftSelection {
 public:
  explicit SoftSelection(int64_t num_keys) : free_(num_keys) {}

  void insert(double score) {
    if (score <= threshold_) return;  // -inf always, since thresholds start there
    if (score == kInfinity) {
      free_ = std::max<int64_t>(free_ - 1, 0);  // a pinned key takes one of k
    } else if (score - threshold_ >= 1) {
      saturated_.push(score);
    } else {
      fractional_.push(score);
    }
    raise_threshold();
  }

  // The threshold in T: not above the exact one, and below the lowest fractional score, so that rounding drops nothing.
  template <typename T>
  T threshold() const {
    const T below = -std::numeric_limits<T>::infinity();
    T rounded = static_cast<T>(threshold_);
    if (rounded > threshold_) rounded = std::nextafter(rounded, below);
    if (rounded >= fractional_.lowest()) rounded = std::nextafter(static_cast<T>(fractional_.lowest()), below);
    return rounded;
  }

 private:
  // The sum of the gates is piecewise linear and falling in the threshold: walk from breakpoint to breakpoint until it
  // has come down to `free_`.
  void raise_threshold() {
    if (free_ == 0) {  // exactly the pinned keys are kept
      saturated_.clear();
      fractional_.clear();
      threshold_ = kInfinity;
      return;
    }
    while (true) {
      const int64_t share = free_ - saturated_.size();  // what the fractional gates must sum to
      if (fractional_.empty() && share >= 0) return;
      const double drop = fractional_.lowest();
      const double soften = saturated_.lowest() - 1;
      // The solution relative to the lowest fractional score: at 0 its gate is exactly 0, and it is dropped.
      const double gap = fractional_.empty() ? 0 : fractional_.excess(share) / fractional_.size();
      const bool solved = gap < 0 && drop + gap <= soften;
      threshold_ = std::max(threshold_, solved ? drop + gap : std::min(drop, soften));
      if (solved) return;
      if (drop <= soften) {
        fractional_.pop();
      } else {
        fractional_.push(saturated_.pop());
      }
    }
  }

  int64_t free_;  // k minus the pinned keys
  double threshold_ = -kInfinity;
  LowestFirst saturated_;
  SummedLowestFirst fractional_;
};

// The k highest scores of a growing set, the lower key winning ties; calls drop(key) for each that is not among them.
class HardSelection {
 public:
  explicit HardSelection(int64_t num_keys) : free_(num_keys) {}

  template <typename Drop>
  void insert(double score, int32_t key, const Drop& drop) {
    if (score == kInfinity) {
      free_ = std::max<int64_t>(free_ - 1, 0);
    } else if (score == -kInfinity || free_ == 0) {
      drop(key);
    } else {
      // Lowest score first and, among equals, the latest key: what goes next is in front.
      kept_.emplace_back(score, -key);
      std::push_heap(kept_.begin(), kept_.end(), std::greater<>());
    }
    while (static_cast<int64_t>(kept_.size()) > free_) {
      std::pop_heap(kept_.begin(), kept_.end(), std::greater<>());
      drop(-kept_.back().second);
      kept_.pop_back();
    }
  }

 private:
  int64_t free_;  // k minus the pinned keys
  std::vector<std::pair<double, int32_t>> kept_;
};

template <typename T>
bool is_seen(double score, T threshold) {
  return score > threshold || score == kInfinity;
}

template <typename T>
void find_causal(const ThresholdParams& params, const double* scores, T* threshold, int32_t* expiry) {
  const int64_t keys = params.keys;
  const int64_t window = std::min(params.pattern.window, keys);
  std::vector<T> at_position(keys);  // also of positions that have no query: keys expire there too
  SoftSelection soft(params.num_keys);
  HardSelection hard(params.num_keys);
  std::fill_n(expiry, keys, kNever);
  for (int64_t position = 0; position < keys; ++position) {
    const int64_t key = position - window;  // becomes a candidate here
    if (key >= 0) {
      soft.insert(scores[key]);
      if (params.pattern.hard)
        hard.insert(scores[key], static_cast<int32_t>(key),
                    [&](int32_t dropped) { expiry[dropped] = static_cast<int32_t>(position); });
    }
    at_position[position] = soft.threshold<T>();
  }
  for (int64_t i = 0; i < params.queries; ++i) {
    const int64_t position = i + keys - params.queries;
    threshold[i] = position < 0 ? -std::numeric_limits<T>::infinity() : at_position[position];
  }
  if (params.pattern.hard) return;
  for (int64_t key = 0; key + window < keys; ++key) {
    if (is_seen(scores[key], at_position.back())) continue;
    const auto first = std::partition_point(at_position.begin() + key + window, at_position.end(),
                                            [&](T t) { return is_seen(scores[key], t); });
    expiry[key] = static_cast<int32_t>(first - at_position.begin());
  }
}

template <typename T>
void find_for_all(const ThresholdParams& params, const double* scores, T* threshold, int32_t* expiry) {
  SoftSelection soft(params.num_keys);
  HardSelection hard(params.num_keys);
  std::fill_n(expiry, params.keys, kNever);
  for (int64_t key = 0; key < params.keys; ++key) {
    soft.insert(scores[key]);
    if (params.pattern.hard)
      hard.insert(scores[key], static_cast<int32_t>(key), [&](int32_t dropped) { expiry[dropped] = 0; });
  }
  std::fill_n(threshold, params.queries, soft.threshold<T>());
  if (params.pattern.hard) return;
  for (int64_t key = 0; key < params.keys; ++key)
    if (!is_seen(scores[key], soft.threshold<T>())) expiry[key] = 0;
}

}  // namespace

template <typename T>
void find_thresholds(const ThresholdParams& params, const double* scores, T* threshold, int32_t* expiry) {
  if (params.pattern.causal) {
    find_causal(params, scores, threshold, expiry);
  } else {
    find_for_all(params, scores, threshold, expiry);
  }
}

template void find_thresholds(const ThresholdParams&, const double*, float*, int32_t*);
template void find_thresholds(const ThresholdParams&, const double*, double*, int32_t*);

}  // namespace sparsek::cpu
