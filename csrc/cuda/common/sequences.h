// The sequences of a call, whose lengths only the device knows where they are packed, and the work over them.
#pragma once

#include <cstdint>

#include "common/rows.h"

namespace sparsek::cuda {

struct Sequence {
  int64_t batch;
  int64_t query_begin;  // row of the batch entry
  int64_t key_begin;
  int32_t queries;
  int32_t keys;

  // Position of query 0 of a causal sequence; negative where there are more queries than keys.
  SPARSEK_HOST_DEVICE int32_t shift() const { return keys - queries; }
};

// Work items of `size` rows each. Sequence s starts at row b(s) and owns the items from b(s) / size + s * extra up to
// b(s + 1) / size + (s + 1) * extra: an upper bound of what it needs, found without a sum over the sequences before it.
// extra = 1 covers items that start at row 0 of a sequence, extra = 2 those that start anywhere.
struct Items {
  int64_t size;
  int64_t extra;
};

// Rows, items and tiles are fewer than 2^32, and 64-bit division is slow on a GPU.
SPARSEK_HOST_DEVICE inline int64_t divide(int64_t a, int64_t b) {
  return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
}

// Tiles of `rows` rows over the queries: tiles.size = rows / heads positions, aligned to multiples of it.
inline Items query_tiles(int64_t rows, int64_t heads) { return {rows / heads, 2}; }

struct Sequences {
  const int32_t* cu_q;  // [count + 1], or null: every batch entry is one sequence
  const int32_t* cu_k;  // [count + 1], or null
  int64_t count;
  int64_t queries;  // Mq
  int64_t keys;     // Mk

  // Lengths that do not rise from 0 to the sizes of the tensors are clamped: wrong results, but no wild access.
  SPARSEK_HOST_DEVICE Sequence at(int64_t s) const {
    if (cu_q == nullptr) return {s, 0, 0, static_cast<int32_t>(queries), static_cast<int32_t>(keys)};
    const int64_t q0 = clamp(cu_q[s], queries), q1 = clamp(cu_q[s + 1], queries);
    const int64_t k0 = clamp(cu_k[s], keys), k1 = clamp(cu_k[s + 1], keys);
    return {0, q0, k0, static_cast<int32_t>(q1 > q0 ? q1 - q0 : 0), static_cast<int32_t>(k1 > k0 ? k1 - k0 : 0)};
  }

  // Items over the rows of the queries or the keys (cu: cu_q and queries, or cu_k and keys).
  SPARSEK_HOST_DEVICE int64_t num_items(const int32_t* cu, int64_t rows, Items items) const {
    return cu == nullptr ? count * (divide(rows, items.size) + items.extra)
                         : divide(rows, items.size) + count * items.extra;
  }

  // First item of sequence s.
  SPARSEK_HOST_DEVICE int64_t first_item(const int32_t* cu, int64_t rows, Items items, int64_t s) const {
    return cu == nullptr ? s * (divide(rows, items.size) + items.extra)
                         : divide(clamp(cu[s], rows), items.size) + s * items.extra;
  }

  // The sequence of an item.
  SPARSEK_HOST_DEVICE int64_t find(const int32_t* cu, int64_t rows, Items items, int64_t item) const {
    if (cu == nullptr) return divide(item, divide(rows, items.size) + items.extra);
    int64_t low = 0, high = count;  // the last s with first_item(s) <= item
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      if (first_item(cu, rows, items, middle) <= item) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }

 private:
  SPARSEK_HOST_DEVICE static int64_t clamp(int64_t x, int64_t total) { return x < 0 ? 0 : x > total ? total : x; }
};

}  // namespace sparsek::cuda
