// Sizes and shared memory of Hopper's forward kernel for short sequences.
#pragma once

#include <cstdint>

#include "cuda/sm90/short_forward/arguments.h"
#include "cuda/sm90/short_forward/launch.h"

namespace sparsek::cuda::sm90 {

template <typename Element_, int kWidth_>
struct ShortForwardTraits {
  using Element = Element_;
  static constexpr int kWidth = kWidth_;  // K and Kv, padded
  // Several CTAs or warpgroups hide each other's latencies, as many as registers allow.
  static constexpr int kWarpgroups = kWidth > 64 ? 3 : 2;
  static constexpr int kCtas = kWidth > 64 ? 1 : 2;  // of a multiprocessor
  static constexpr int kThreads = 128 * kWarpgroups;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kTileRows = 64;  // of a warpgroup
  static constexpr int kRows = kTileRows * kWarpgroups;
  static constexpr int kSlots = 64;  // keys of a unit of work
  static constexpr int kStages = kWidth > 64 ? 3 : 4;
  static constexpr int kMaxKeys = static_cast<int>(kMaxShortKeysSm90);
  static_assert(kMaxKeys % kSlots == 0);

  // Operands are columns of 64 elements: rows of 128 bytes in the 128-byte swizzle.
  using Stage = Element[kWidth / 64][kSlots][64];
  struct Shared {
    alignas(1024) Element query[kWarpgroups][2][kWidth / 64][kTileRows][64];  // then the output, on its way out
    alignas(1024) Stage key[kStages];
    alignas(1024) Stage value[kStages];
    alignas(16) int32_t keys[kMaxKeys];  // that are seen
    alignas(16) float bias[kMaxKeys];    // log2 of their gates
    int2 found[kWarps];                  // how many keys, and the first
    uint64_t query_full[kWarpgroups][2];
    uint64_t key_full[kStages], key_empty[kStages];
    uint64_t value_full[kStages], value_empty[kStages];
  };
  static constexpr int64_t kSharedBytes = sizeof(Shared) + 1024;  // to be aligned
  static_assert(kCtas * (kSharedBytes + 1024) <= 228 * 1024);
};

}  // namespace sparsek::cuda::sm90
