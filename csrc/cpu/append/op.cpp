// The operator `append`: one more token in a cache, and what its query sees.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

#include "common/cache.h"
#include "common/pattern.h"
#include "cpu/common/tasks.h"
#include "cpu/common/tensor.h"
#include "cpu/selection/thresholds.h"

namespace sparsek::cpu {
namespace {

// The cache of one batch entry and key/value head.
template <typename T>
class Appender {
 public:
  explicit Appender(const AppendParams<T>& params) : p_(params) {}

  void operator()(int64_t head) {
    const Cache<T>& c = p_.cache;
    const int64_t batch = head / p_.groups, group = head % p_.groups, places = c.slots + c.window;
    key_ = c.key + head * places * c.key_bytes;
    value_ = c.value + head * places * c.value_bytes;
    score_ = c.score + head * places;
    position_ = c.position + head * c.slots;
    next_ = c.next + head;
    if (score_[*next_] > kNone) {  // what found no room goes, now that its query has seen it
      ++c.overflow[head];
      score_[*next_] = kNone;
    }
    T fresh;
    load_row(p_.columns, p_.columns.row(batch, 0, group), T(1), &fresh);
    const int64_t length = c.length[head]++;
    const char *key = p_.key.row(batch, 0, group), *value = p_.value.row(batch, 0, group);
    if (c.window == 0) {
      enter(fresh, length, key, value);
    } else {
      const int64_t place = length % c.window, row = c.slots + place;
      T& waiting = c.waiting[head * c.window + place];
      if (length >= c.window) enter(waiting, length - c.window, key_ + row * c.key_bytes, value_ + row * c.value_bytes);
      waiting = fresh;
      write(row, key, value, std::numeric_limits<T>::infinity());
    }
    select(p_.threshold + head, p_.expiry + head * places);
  }

 private:
  static constexpr T kNone = -std::numeric_limits<T>::infinity();

  void write(int64_t row, const char* key, const char* value, T score) {
    std::memcpy(key_ + row * p_.cache.key_bytes, key, p_.cache.key_bytes);
    std::memcpy(value_ + row * p_.cache.value_bytes, value, p_.cache.value_bytes);
    score_[row] = score;
  }

  // A key becomes a candidate.
  void enter(T score, int64_t position, const char* key, const char* value) {
    if (score == kNone) return;
    write(*next_, key, value, score);
    position_[*next_] = static_cast<int32_t>(position);
  }

  // Finds the threshold, and empties the slots of keys that no query will see again.
  void select(T* threshold, int32_t* expiry) {
    const int64_t slots = p_.cache.slots, places = slots + p_.cache.window;
    present_.clear();
    for (int64_t slot = 0; slot < slots; ++slot)
      if (score_[slot] > kNone) present_.push_back(static_cast<int32_t>(slot));
    if (p_.hard)  // of equal scores keeps the earlier ones, so they come in the order of the sequence
      std::sort(present_.begin(), present_.end(), [&](int32_t a, int32_t b) { return position_[a] < position_[b]; });
    const int64_t count = static_cast<int64_t>(present_.size());
    column_.resize(count);
    seen_.resize(count);
    for (int64_t i = 0; i < count; ++i) column_[i] = score_[present_[i]];
    find_thresholds(ThresholdParams{{0, false, p_.hard}, p_.num_keys, count, 1}, column_.data(), threshold,
                    seen_.data());
    std::fill(expiry, expiry + slots, 0);
    for (int64_t i = 0; i < count; ++i) {
      expiry[present_[i]] = seen_[i];
      if (seen_[i] == 0) score_[present_[i]] = kNone;
    }
    for (int64_t row = slots; row < places; ++row) expiry[row] = score_[row] > kNone ? kNever : 0;
    *next_ = 0;
    for (int32_t slot = 1; slot < slots; ++slot)
      if (score_[slot] < score_[*next_] ||
          (score_[slot] == score_[*next_] && score_[slot] > kNone && position_[slot] > position_[*next_]))
        *next_ = slot;
  }

  const AppendParams<T>& p_;
  char *key_, *value_;
  T* score_;
  int32_t *position_, *next_;
  std::vector<int32_t> present_, seen_;
  std::vector<double> column_;
};

template <typename T>
std::tuple<Tensor, Tensor> run_append(const Tensor& key, const Tensor& value, const Tensor& scores,
                                      const CacheTensors& cache, int64_t num_keys, int64_t window, bool hard) {
  AppendParams<T> params = make_append<T>(key, value, scores, cache, num_keys, window, hard);
  const int64_t heads = params.batch * params.groups;
  Tensor threshold = make_empty(key, {params.batch, params.groups, 1}, scalar_type<T>());
  Tensor expiry = make_empty(key, {params.batch, params.groups, params.cache.slots + window}, ScalarType::Int);
  params.threshold = static_cast<T*>(threshold.mutable_data_ptr());
  params.expiry = static_cast<int32_t*>(expiry.mutable_data_ptr());
  for (int64_t head = 0; head < heads; ++head) {
    T score;
    load_row(params.columns, params.columns.row(head / params.groups, 0, head % params.groups), T(1), &score);
    STD_TORCH_CHECK(!std::isnan(score), "scores contain NaN, shape ", shape_of(scores));
  }
  run_tasks(heads, [&] { return Appender<T>(params); });
  return {threshold, expiry};
}

std::tuple<Tensor, Tensor> append(const Tensor& key, const Tensor& value, const Tensor& scores, const Tensor& key_cache,
                                  const Tensor& value_cache, const Tensor& score, const Tensor& waiting,
                                  const Tensor& position, const Tensor& next, const Tensor& length,
                                  const Tensor& overflow, int64_t num_keys, int64_t window, bool hard) {
  const CacheTensors cache{key_cache, value_cache, score, waiting, position, next, length, overflow};
  const auto run = key.scalar_type() == ScalarType::Double ? run_append<double> : run_append<float>;
  return run(with_dense_rows(key), with_dense_rows(value), scores, cache, num_keys, window, hard);
}

}  // namespace
}  // namespace sparsek::cpu

STABLE_TORCH_LIBRARY_IMPL(xformers_sparsek, CPU, m) { m.impl("append", TORCH_BOX(&sparsek::cpu::append)); }
