// The blocks of keys that a tile reads, one after the other, as tables in shared memory.
#pragma once

#include <limits>

#include "cuda/plan/tile.cuh"

namespace sparsek::cuda::sm80 {

// How the gates of a block are found. All of them give the same bits where they apply.
enum GateMode : int32_t {
  kNoBlock,
  kSolid,   // every row of the tile sees every key with a gate of 1
  kGated,   // by the scores
  kMasked,  // by the scores, for positions in [from, from + span)
};

struct BlockTable {
  int32_t key[kBlock];   // of the sequence; key 0 stands for those that do not exist, which no row sees
  int32_t from[kBlock];  // the first position that sees the key here
  float score[kBlock];   // gate = clip(score - threshold, 0, 1)
  GateMode mode;
  uint32_t span;
};

// Goes through the blocks of a tile. One warp uses it, in shared memory for want of registers.
struct BlockCursor {
  TileBlocks blocks;
  int32_t keys;     // of the sequence
  float threshold;  // the highest of the tile: of its last query
  int32_t base;     // blocks [base, base + 32) are classified
  uint32_t live;    // those not yet gone through
  uint32_t solid;
  uint32_t masked;
};

__device__ inline GateMode classify(const BlockCursor& cursor, int32_t block) {
  const TileBlocks& blocks = cursor.blocks;
  if (block >= blocks.end) return kNoBlock;
  if (blocks.is_window(block)) {
    const int32_t key = blocks.first_key(block);
    return key > blocks.last - blocks.window && key + kBlock - 1 <= blocks.first ? kSolid : kMasked;
  }
  // Everything is loaded before anything is looked at.
  const RunView& run = blocks.run;
  const int32_t begin = block * kBlock, end = min(begin + kBlock, run.count);
  const int32_t expiry = run.block_expiry[block * run.block_stride];
  const int32_t first_key = run.key_of(begin), last_key = run.key_of(end - 1);
  const float lowest = run.block_score == nullptr ? -std::numeric_limits<float>::infinity() : run.block_score[block];
  if (expiry <= blocks.first || (begin >= run.entering && first_key + blocks.window > blocks.last)) return kNoBlock;
  if (end > run.entering && last_key + blocks.window > blocks.first) return kMasked;
  return end == begin + kBlock && lowest - cursor.threshold >= 1.0f ? kSolid : kGated;
}

// A block on its way to a table: the slots lane and lane + 32 of each lane of a warp.
struct BlockSlots {
  GateMode mode;
  bool is_window;
  int32_t key[2];
  float score[2];
};

// The next block that the tile reads. For all lanes of a warp together.
__device__ inline BlockSlots load_next_block(BlockCursor& cursor) {
  const TileBlocks& blocks = cursor.blocks;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int32_t base = cursor.base;
  uint32_t live = cursor.live, solid = cursor.solid, masked = cursor.masked;
  while (live == 0 && base + 32 < blocks.end) {
    base += 32;
    const GateMode mode = classify(cursor, base + lane);
    live = __ballot_sync(~0u, mode != kNoBlock);
    solid = __ballot_sync(~0u, mode == kSolid);
    masked = __ballot_sync(~0u, mode == kMasked);
  }
  __syncwarp();
  if (lane == 0) {
    cursor.base = base;
    cursor.live = live & (live - 1);
    cursor.solid = solid;
    cursor.masked = masked;
  }
  __syncwarp();

  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  BlockSlots slots{kNoBlock, false, {0, 0}, {-kInfinity, -kInfinity}};
  if (live == 0) return slots;
  const int bit = __ffs(static_cast<int>(live)) - 1;
  const int32_t block = base + bit;
  slots.mode = solid >> bit & 1 ? kSolid : masked >> bit & 1 ? kMasked : kGated;
  slots.is_window = blocks.is_window(block);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (slots.is_window) {
      const int32_t key = blocks.first_key(block) + lane + 32 * i;
      if (key < cursor.keys) {
        slots.key[i] = key;
        slots.score[i] = kInfinity;
      }
    } else {
      const int32_t slot = block * kBlock + lane + 32 * i;
      if (slot < blocks.run.count) {
        slots.key[i] = blocks.run.key_of(slot);
        slots.score[i] = blocks.run.score_of(slot);
      }
    }
  }
  return slots;
}

__device__ inline void store_block(BlockTable& table, const BlockSlots& slots, int64_t window) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int slot = lane + 32 * i;
    const int64_t from = slots.key[i] + (slots.is_window ? 0 : window);
    table.key[slot] = slots.key[i];
    table.from[slot] = static_cast<int32_t>(min(from, static_cast<int64_t>(kNever)));
    table.score[slot] = slots.score[i];
  }
  if (lane == 0) {
    table.mode = slots.mode;
    table.span = slots.is_window ? static_cast<uint32_t>(window) : 1u << 31;
  }
}

// Starts over, and stores the first two blocks.
__device__ inline void rewind(BlockCursor& cursor, BlockTable (&tables)[2]) {
  if (threadIdx.x % 32 == 0) {
    cursor.base = -32;
    cursor.live = 0;
  }
  __syncwarp();
  const BlockSlots first = load_next_block(cursor), second = load_next_block(cursor);
  store_block(tables[0], first, cursor.blocks.window);
  store_block(tables[1], second, cursor.blocks.window);
}

}  // namespace sparsek::cuda::sm80
