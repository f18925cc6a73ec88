// Sizes, shared memory and barriers of the Hopper backward kernel.
#pragma once

#include <cstdint>

#include "cuda/plan/tile.cuh"
#include "cuda/sm90/backward/arguments.h"
#include "cuda/sm90/ring.cuh"

namespace sparsek::cuda::sm90 {

// How the gradient of a key enters the sums of the units before.
enum Mode : uint8_t { kSkip, kStore, kAdd };

// Units of neighbouring groups are begun in turn, so that those of one group are not all at the same tile at once.
constexpr int kPack = 8;

// What all must know of a unit of keys.
struct alignas(16) Unit {
  Sequence sequence;
  RunView view;  // for lists
  int64_t group;
  int64_t run;            // item, for lists
  int64_t lse_row;        // of position 0 and the group's first head in [B, H, Mq]
  int64_t threshold_row;  // in [B, G, Mq]
  int64_t column;         // of the sequence's first key in [B, G, Mk]
  int64_t tile;           // tile item that starts at position 0; may lie before those of the sequence
  int32_t number;         // of the unit, in its run or sequence
  int32_t count;          // units there
  int32_t units_before;   // of the run after this one, all of which add their sums first
  int32_t first_query;    // positions of the queries that exist: [first_query, end_query)
  int32_t end_query;
  int32_t first_tile;  // tiles that may see a key: [first_tile, end_tile)
  int32_t end_tile;
  int32_t all_entered;  // from this position on, all keys count by their scores
  float open_score;     // the lowest score, or -inf where gates must be looked at
  bool done;            // there is no unit left
  bool windows;
  int32_t key[kKeys];       // relative to the sequence, or -1
  float score[kKeys];       // what gates are measured by
  float soft_score[kKeys];  // of the key, for hard selection
  int32_t from[kKeys];      // the first position that sees the key by its score; in windows the key
  Mode mode[kKeys];
};

template <int kRows>
struct alignas(16) TileRows {
  float lse[kRows];  // in base 2
  float delta[kRows];
  float threshold[kRows];       // what gates are measured by; NaN: no such query
  float soft_threshold[kRows];  // what decides whether a gate is fractional, for hard selection
};

template <typename Element, int kWidth, int kRows, bool kCareful>
struct CleanTiles {};
// Right factors of products, with 0 for what is not finite.
template <typename Element, int kWidth, int kRows>
struct CleanTiles<Element, kWidth, kRows, true> {
  alignas(1024) Element clean_key[kWidth / 64][kKeys][64];
  alignas(1024) Element clean_query[kWidth / 64][kRows][64];
  alignas(1024) Element clean_grad[kWidth / 64][kRows][64];
  uint8_t bad_key[kKeys], bad_query[kRows], bad_grad[kRows];
};

// kCareful: the second pass, over groups with values that are not finite. In a product those reach who does not see
// them, since 0 * NaN is NaN; here they are replaced by 0, and the weights that meet them by NaN.
template <typename Element_, int kWidth_, bool kCareful_>
struct BackwardTraits {
  using Element = Element_;
  static constexpr int kWidth = kWidth_;  // K and Kv, padded
  static constexpr bool kCareful = kCareful_;
  static constexpr int kRows = tile_rows(kWidth);  // of a query tile
  static constexpr int kQueryStages = kCareful ? 1 : 2;
  static constexpr int kGradStages = kCareful ? 1 : 2;  // of gradients of outputs
  static constexpr int kFactors = kCareful ? 1 : 2;
  static constexpr int kUnits = 2;  // one is looked up while another is worked on
  static constexpr int kThreads = 384;
  static constexpr int kProducerRegisters = 40;
  static constexpr int kConsumerRegisters = 232;
  // A CTA begins with 168 for each of its threads: consumers would wait forever for more than producers give back.
  static_assert(kProducerRegisters + 2 * kConsumerRegisters <= 3 * 168);
  static constexpr int kConsumerWarps = 8;

  using Clean = CleanTiles<Element, kWidth, kRows, kCareful>;

  // Operands are columns of 64 elements: rows of 128 bytes in the 128-byte swizzle.
  struct Shared : Clean {
    alignas(1024) Element key[kWidth / 64][kKeys][64];
    alignas(1024) Element value[kWidth / 64][kKeys][64];
    alignas(1024) Element query[kQueryStages][kWidth / 64][kRows][64];
    alignas(1024) Element grad[kGradStages][kWidth / 64][kRows][64];
    alignas(1024) Element factor[kFactors][kRows / 64][kKeys][64];  // gradients of logits, transposed
    alignas(1024) float sums[tile_floats(kWidth)];
    Unit units[kUnits];
    TileRows<kRows> rows[kGradStages];
    uint64_t unit_full[kUnits], unit_empty[kUnits];
    uint64_t unit_wanted;  // the end of the last one is near
    uint64_t key_full, value_full, keys_empty;
    uint64_t query_full[kQueryStages], query_empty[kQueryStages];
    uint64_t grad_full[kGradStages], grad_empty[kGradStages];
    uint64_t sums_full, sums_empty;
  };
  static_assert(sizeof(Shared) + 1024 <= 227 * 1024);
};

// Named barriers: 0 is __syncthreads.
constexpr int kConsumerBarrier = 1;

// How many units a run's list has.
__device__ inline int32_t count_units(const BackwardArguments& a, int64_t run, int64_t group) {
  const AttentionParams<float>& p = a.params;
  int64_t count = a.plan.head[run * p.groups + group].count;
  if (count == kDense) {
    const int64_t s = p.sequences.find(p.sequences.cu_k, p.keys, a.plan.runs, run);
    const int64_t r = run - p.sequences.first_item(p.sequences.cu_k, p.keys, a.plan.runs, s);
    const int64_t end = min((r + 1) * a.plan.runs.size, static_cast<int64_t>(p.sequences.at(s).keys));
    count = max(end - p.pattern.window, int64_t{0});
  }
  return static_cast<int32_t>((count + kKeys - 1) / kKeys);
}

// The tiles that may see a key of a unit.
struct TileRange {
  int32_t begin, end;

  __device__ bool has(int32_t tile) const { return begin <= tile && tile < end; }
};

// Of the unit `number` of those that `unit` is one of; its own number need not be set.
template <int kRows>
__device__ inline TileRange find_tiles(const Unit& unit, const Pattern& pattern, int32_t number) {
  int64_t begin = unit.first_query, end = unit.end_query;
  const int64_t slot = static_cast<int64_t>(number) * kKeys;
  const RunView& view = unit.view;
  if (unit.windows) {
    begin = max(begin, slot);
    end = min(end, slot + kKeys - 1 + pattern.window);
  } else if (pattern.causal) {
    if (slot >= view.entering) begin = max(begin, view.key_of(static_cast<int32_t>(slot)) + pattern.window);
    int32_t expiry = view.block_expiry[2 * number * view.block_stride];
    if (slot + kBlock < view.count) expiry = max(expiry, view.block_expiry[(2 * number + 1) * view.block_stride]);
    end = min(end, static_cast<int64_t>(expiry));
  }
  if (begin >= end) return {0, 0};
  return {static_cast<int32_t>(begin) / kRows, static_cast<int32_t>(end - 1) / kRows + 1};
}

// Calls visit(head of the group, tile) for what a unit goes through.
template <typename Visit>
__device__ __forceinline__ void for_each_tile_of(const Unit& unit, int32_t heads, const Visit& visit) {
#pragma unroll 1
  for (int32_t head = 0; head < heads; ++head)
#pragma unroll 1
    for (int32_t tile = unit.first_tile; tile < unit.end_tile; ++tile) visit(head, tile);
}

}  // namespace sparsek::cuda::sm90
