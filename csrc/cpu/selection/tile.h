// The keys that a tile of queries sees, gathered into dense blocks.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/pattern.h"
#include "cpu/common/blas.h"
#include "cpu/common/buffer.h"
#include "cpu/common/tensor.h"
#include "cpu/selection/plan.h"

namespace sparsek::cpu {

constexpr int64_t kKeyBlock = 512;  // columns of the matrix products

// The queries of one tile: `positions` of them for each head of the group, row h * positions + i of the matrices being
// query i of head h.
struct TileRows {
  int32_t begin;  // positions of the tile
  int32_t end;
  int32_t first;      // position of its first query; later than `begin` where the sequence has fewer queries than keys
  int32_t positions;  // queries per head
  int64_t query;      // row of the first query in the batch entry
  int64_t head;       // first head of the group
  int64_t heads_per_group;

  int64_t count() const { return positions * heads_per_group; }
  int32_t position(int64_t r) const { return first + static_cast<int32_t>(r % positions); }

  // Calls visit(r, row of the batch entry, query head) for every row.
  template <typename Visit>
  void for_each(const Visit& visit) const {
    for (int64_t h = 0; h < heads_per_group; ++h)
      for (int64_t i = 0; i < positions; ++i) visit(h * positions + i, query + i, head + h);
  }
};

// Calls visit(TileRows) for every tile of the segment that has queries.
template <typename Visit>
void for_each_tile(const Segment& segment, const Sequence& sequence, int64_t tile, int64_t heads_per_group,
                   const Visit& visit) {
  const int32_t shift = segment.causal ? static_cast<int32_t>(sequence.shift()) : 0;
  for (int32_t begin = segment.begin; begin < segment.end; begin += static_cast<int32_t>(tile)) {
    const int32_t end = std::min(segment.end, begin + static_cast<int32_t>(tile));
    const int32_t first = std::max(begin, shift);
    if (first < end)
      visit(TileRows{begin, end, first, end - first, sequence.query_begin + first - shift,
                     segment.group * heads_per_group, heads_per_group});
  }
}

// What decides whether a query at position p sees the key of column c, and with which gate.
template <typename T>
struct Columns {
  const int32_t* seen_from;   // p >= seen_from[c] and
  const int32_t* expiry;      // p < expiry[c]: seen
  const int32_t* gated_from;  // p >= gated_from[c]: gated by its score, with gate 1 before
  const T* score;

  bool sees(int64_t c, int32_t position) const { return seen_from[c] <= position && position < expiry[c]; }
};

// The columns of one tile: the keys that its first query still sees, then, if causal, all keys at its own positions.
// A column's index depends on nothing after its key, so what a query computes does not depend on later tokens either,
// down to the last bit.
template <typename T>
class TileColumns {
 public:
  // expiry, score [keys of the sequence].
  void fill(const Segment& segment, const Pattern& pattern, const int32_t* expiry, const T* score,
            const TileRows& tile) {
    count_ = 0;
    const int32_t slots = segment.num_slots();
    for (auto* column : {&slot_, &seen_from_, &expiry_, &gated_from_}) column->resize(slots);
    score_.resize(slots);
    for (int32_t slot = 0; slot < slots; ++slot) {
      const int32_t key = segment.key(slot);
      if (pattern.causal && key >= tile.end) break;
      if (pattern.causal && key < tile.begin && expiry[key] <= tile.begin) continue;
      slot_[count_] = slot;
      seen_from_[count_] = pattern.causal ? key : 0;
      expiry_[count_] = expiry[key];
      gated_from_[count_] = pattern.causal ? static_cast<int32_t>(std::min<int64_t>(key + pattern.window, kNever)) : 0;
      score_[count_] = score[key];
      ++count_;
    }
  }

  int64_t count() const { return count_; }
  int32_t slot(int64_t c) const { return slot_[c]; }
  Columns<T> from(int64_t c) const {
    return {seen_from_.data() + c, expiry_.data() + c, gated_from_.data() + c, score_.data() + c};
  }

 private:
  int64_t count_ = 0;
  std::vector<int32_t> slot_, seen_from_, expiry_, gated_from_;
  std::vector<T> score_;
};

// A block of key or value rows in the dtype of computation. A row that is not finite is replaced by zeros, lest
// 0 * NaN in a matrix product reach queries that do not see its key; `add_products` and `set_products` then give those
// that do see it what they are due.
template <typename T>
class GatheredRows {
 public:
  explicit GatheredRows(const Rows& source)
      : source_(source), row_(kKeyBlock), finite_(kKeyBlock), data_(kKeyBlock * source.width), spare_(source.width) {}

  // key_of(c) is the row of column c in the batch entry.
  template <typename KeyOf>
  void gather(int64_t batch, int64_t head, int64_t count, const KeyOf& key_of) {
    count_ = count;
    for (int64_t c = 0; c < count; ++c) row_[c] = source_.row(batch, key_of(c), head);
    load_rows(source_, row_.data(), count, T(1), data_.data(), finite_.data());
    poisoned_.clear();
    for (int64_t c = 0; c < count; ++c) {
      if (finite_[c]) continue;
      std::fill_n(data_.data() + c * source_.width, source_.width, T(0));
      poisoned_.push_back(c);
    }
  }

  Matrix<T> matrix() const { return {data_.data(), count_, source_.width, source_.width}; }

  // out[r, c] = a[r, :] . row c, for poisoned columns c that row r sees.
  template <typename Sees>
  void set_products(const Matrix<T>& out, const Matrix<T>& a, const Sees& sees) const {
    for (int64_t c : poisoned_) {
      load_row(source_, row_[c], T(1), spare_.data());
      for (int64_t r = 0; r < out.rows; ++r) {
        if (!sees(r, c)) continue;
        T sum = 0;
        for (int64_t i = 0; i < source_.width; ++i) sum += a.data[r * a.row_stride + i] * spare_[i];
        out.data[r * out.row_stride + c] = sum;
      }
    }
  }

  // out[r, :] += weights[r, c] * row c, for poisoned columns c that row r sees.
  template <typename Sees>
  void add_products(const Matrix<T>& out, const Matrix<T>& weights, const Sees& sees) const {
    for (int64_t c : poisoned_) {
      load_row(source_, row_[c], T(1), spare_.data());
      for (int64_t r = 0; r < out.rows; ++r) {
        if (!sees(r, c)) continue;
        const T weight = weights.data[r * weights.row_stride + c];
        for (int64_t i = 0; i < source_.width; ++i) out.data[r * out.row_stride + i] += weight * spare_[i];
      }
    }
  }

 private:
  Rows source_;
  int64_t count_ = 0;
  Buffer<const char*> row_;  // [kKeyBlock]
  Buffer<bool> finite_;      // [kKeyBlock]
  Buffer<T> data_;           // [kKeyBlock, width]
  Buffer<T> spare_;          // [width]
  std::vector<int64_t> poisoned_;
};

}  // namespace sparsek::cpu
