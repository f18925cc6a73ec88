// Sizes, shared memory and barriers of the Hopper forward kernel.
#pragma once

#include <cstdint>

#include "cuda/plan/tile.cuh"
#include "cuda/sm90/forward/arguments.h"

namespace sparsek::cuda::sm90 {

// kCareful: the second pass, over the tiles that met values which are not finite. In a product those reach rows that do
// not see them, since 0 * NaN is NaN; here they are replaced by 0, and rows that do see one become NaN.
template <typename Element_, int kWidth_, int kValueWidth_, bool kCareful_>
struct ForwardTraits {
  using Element = Element_;
  static constexpr int kWidth = kWidth_;            // K, padded
  static constexpr int kValueWidth = kValueWidth_;  // Kv, padded
  static constexpr bool kCareful = kCareful_;
  static constexpr int kRows = 128;   // of a query tile: 64 for each consumer
  static constexpr int kSlots = 128;  // keys of a unit of work: two blocks of the plan
  static constexpr int kStages = kWidth + kValueWidth > 128 ? 2 : 4;
  static constexpr int kNotes = 2 * kStages;  // a unit's notes outlive its keys: consumers read them after the product
  static constexpr int kRowPlaces = 3;        // rows are described one tile ahead, and read to the end of theirs
  static constexpr int kConsumers = 2;        // warpgroups
  static constexpr int kThreads = 128 * (1 + kConsumers);
  static constexpr int kProducerRegisters = 56;
  static constexpr int kConsumerRegisters = 224;

  // What the consumers must know of a unit, and of the rows of a tile.
  enum Flags : uint32_t {
    kLast = 1,      // of its tile
    kSolid = 2,     // all gates are 1
    kEntering = 4,  // a slot counts from the position `entry` on only
    kWindow = 8,    // `entry` holds the keys themselves, and gates are 1 within the window
    kSeen = 16,     // all gates are above 0
  };
  enum Message : uint32_t { kKeys, kNoKeys, kDone };  // of a tile: units follow; none do; no further tile does
  struct alignas(16) Notes {
    float score[kSlots];
    int32_t entry[kSlots];
    uint32_t flags;
  };
  struct alignas(8) Row {
    const char* source;
    char* out;  // null: no such query
    float* lse;
    float threshold;  // NaN: out and LSE are NaN
    int32_t position;
  };

  // Operands are columns of 64 elements: rows of 128 bytes in the 128-byte swizzle.
  struct Shared {
    alignas(1024) Element query[kWidth / 64][kRows][64];
    alignas(1024) Element key[kStages][kWidth / 64][kSlots][64];
    alignas(1024) Element value[kStages][kValueWidth / 64][kSlots][64];
    Notes notes[kNotes];
    Row rows[kRowPlaces][kRows];
    Message message;
    alignas(16) int32_t key_rows[kSlots], value_rows[kSlots];  // scratch of the producer
    uint8_t poisoned[kStages][kSlots];                         // values that were not finite
    int64_t work[kRowPlaces];                                  // of the tile
    TileBlocks blocks[4];                                      // of its warps
    uint64_t query_full, query_empty;
    uint64_t key_full[kStages], key_empty[kStages];
    uint64_t value_full[kStages], value_empty[kStages];
  };
  static_assert(sizeof(Shared) + 1024 <= 227 * 1024);
};

// Named barriers: 0 is __syncthreads; these let one consumer issue its products while the other is at its softmax.
constexpr int kTurnBarrier = 1;  // + index of the consumer

}  // namespace sparsek::cuda::sm90
