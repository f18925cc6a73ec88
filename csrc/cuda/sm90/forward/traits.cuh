// Sizes, shared memory and barriers of the Hopper forward kernel.
#pragma once

#include <cstdint>

#include "cuda/plan/tile.cuh"
#include "cuda/sm90/forward/arguments.h"
#include "cuda/sm90/ring.cuh"

namespace sparsek::cuda::sm90 {

// kCareful: the second pass, over the tiles that met values which are not finite. In a product those reach rows that do
// not see them, since 0 * NaN is NaN; here they are replaced by 0, and rows that do see one become NaN.
template <typename Element_, int kWidth_, bool kCareful_>
struct ForwardTraits {
  using Element = Element_;
  static constexpr int kWidth = kWidth_;  // K and Kv, padded
  static constexpr bool kCareful = kCareful_;
  static constexpr int kConsumers = kForwardConsumers;  // warpgroups
  static constexpr int kRows = 64 * kConsumers;         // of a query tile
  static constexpr int kSlots = kUnit;                  // keys of a unit of work
  static constexpr int kStages = kWidth > 64 ? 3 : 6;
  static constexpr int kNotes = 2 * kStages;  // a unit's notes outlive its keys: consumers read them after the product
  __device__ static int note_of(const Ring<kStages>& keys) {
    return keys.place + static_cast<int>(keys.phase) * kStages;
  }
  static constexpr int kQueryStages = 2;  // tiles
  // Whether consumers issue their products one after another: then one makes weights under those of the others. At 64
  // columns it costs as much as it gives.
  static constexpr bool kTurns = kWidth > 64;
  static constexpr int kThreads = 128 * (1 + kConsumers);
  static constexpr int kProducerRegisters = 56;
  static constexpr int kConsumerRegisters = 152;
  // What a launch gives its threads, of which no more than these are shared out: else the kernel waits for ever.
  static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= (1 + kConsumers) * kLaunchRegisters);

  // What the consumers must know of a unit, and of the rows of a tile.
  enum Flags : uint32_t {
    kLast = 1,      // of its tile
    kSolid = 2,     // all gates are 1
    kPlaced = 4,    // a slot counts at `span` positions from `entry` on only
    kGathered = 8,  // rows were not copied by the proxy that the tensor cores read through
  };
  enum Message : uint32_t { kKeys, kNoKeys, kDone };  // of a tile: units follow; none do; no further tile does
  // Of the slots that one thread of a row has, in order. Padded, so that the four threads of a row read from different
  // banks.
  struct alignas(16) Column {
    float score[20];
    int32_t entry[20];
  };
  struct Notes {
    Column column[4];  // of the threads of a row
    uint32_t flags;
    uint32_t span;
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
    alignas(1024) Element query[kQueryStages][kWidth / 64][kRows][64];  // then the output, on its way out
    alignas(1024) Element key[kStages][kWidth / 64][kSlots][64];
    alignas(1024) Element value[kStages][kWidth / 64][kSlots][64];
    Notes notes[kNotes];
    Row rows[kQueryStages][kRows];
    alignas(16) int32_t key_rows[kSlots], value_rows[kSlots];  // scratch of the producer
    uint8_t poisoned[kStages][kSlots];                         // values that were not finite
    TileBlocks blocks[4];                                      // of its warps
    int64_t number[kQueryStages];                              // of the tile; negative: there is none left
    int64_t place[kQueryStages];                               // of the tile among `suspects`
    Message message[kQueryStages];
    uint64_t number_full[kQueryStages];  // numbers are there; they are read until `query_empty`
    uint64_t query_full[kQueryStages], query_empty[kQueryStages];
    uint64_t key_full[kStages], key_empty[kStages];
    uint64_t value_full[kStages], value_empty[kStages];
  };
  static_assert(sizeof(Shared) + 1024 <= 227 * 1024);
};

// Named barriers: 0 is __syncthreads.
constexpr int kSignBarrier = 1;                                 // + index of the consumer: its queries have their sign
constexpr int kTurnBarrier = kSignBarrier + kForwardConsumers;  // + index of the consumer: it is its turn

}  // namespace sparsek::cuda::sm90
