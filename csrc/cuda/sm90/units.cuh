// What producers of the Hopper kernels share: the units of keys that a tile of queries reads, and the copies of their
// rows.
#pragma once

#include "cuda/plan/tile.cuh"
#include "cuda/sm90/ptx.cuh"

namespace sparsek::cuda::sm90 {

// The units of a tile in order: blocks of its run's list, then of its window. All lanes of a warp move together.
class UnitCursor {
 public:
  // `memory`: of this warp, in shared memory, since registers are scarce.
  __device__ explicit UnitCursor(TileBlocks& memory) : blocks_(memory) {}

  __device__ void start(const TileBlocks& blocks) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) blocks_ = blocks;
    __syncwarp();
    lists_ = blocks.lists;
    end_ = blocks.end;
    base_ = -32;
    live_ = 0;
    unit_ = -1;
  }

  __device__ const TileBlocks& blocks() const { return blocks_; }
  __device__ bool is_window(int32_t unit) const { return unit >= lists_; }
  __device__ int32_t first_key(int32_t unit) const { return blocks_.first_key(unit); }

  // The next unit that some query of the tile may see, or -1.
  __device__ int32_t next() {
    if (unit_ < lists_) {
      while (live_ == 0) {
        base_ += 32;
        if (base_ >= lists_) break;
        const int32_t mine = base_ + static_cast<int32_t>(threadIdx.x % 32);
        live_ = __ballot_sync(~0u, mine < lists_ && blocks_.is_live(mine));
      }
      if (live_ != 0) {
        unit_ = base_ + __ffs(live_) - 1;
        live_ &= live_ - 1;
        return unit_;
      }
      unit_ = lists_ - 1;
    }
    return ++unit_ < end_ ? unit_ : -1;
  }

 private:
  TileBlocks& blocks_;
  int32_t lists_, end_;  // in units
  int32_t base_;         // live_ is about units [base_, base_ + 32)
  uint32_t live_;        // those not yet returned
  int32_t unit_;
};

// Copies the rows of a warp, kRows of the kSlots of a unit, to shared memory: eight lanes take a row, 128 bytes at
// once, so that an address serves all of its columns of 64 elements; each group of lanes takes consecutive rows, a
// power of two, whose keys it reads together.
template <typename Element, int kWidth, int kSlots, int kRows>
class RowCopier {
 public:
  static constexpr int kRowsOfLane = kRows / 4, kColumns = kWidth / 64;
  static_assert(kRowsOfLane % 4 == 0);

  __device__ explicit RowCopier(const Rows& rows)
      : chunk_(static_cast<int>(threadIdx.x) % 8),
        first_(static_cast<int>(threadIdx.x) % 32 / 8 * kRowsOfLane),
        row_(static_cast<int>(threadIdx.x) / 32 * kRows % kSlots + first_),
        stride_(static_cast<uint32_t>(rows.stride[1] * sizeof(Element))),
        width_(static_cast<int>(rows.width)) {}

  // keys [kRows] of this warp, relative to `base`; -1 for none: those rows are zeroed. `whole`: there are no such rows.
  __device__ void copy(const int32_t* keys, bool whole, const char* base, uint32_t to) const {
    const char* from = base + chunk_ * 16;
    asm volatile("" : "+l"(from));  // in registers next to each other: else there are three instructions a row
    if (whole && width_ == kWidth) {
#pragma unroll
      for (int i = 0; i < kRowsOfLane; i += 4) {
        const int4 key = *reinterpret_cast<const int4*>(keys + first_ + i);
        copy_row(place(to, i), row_of(from, key.x));
        copy_row(place(to, i + 1), row_of(from, key.y));
        copy_row(place(to, i + 2), row_of(from, key.z));
        copy_row(place(to, i + 3), row_of(from, key.w));
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < kRowsOfLane; ++i) {
        const int32_t key = keys[first_ + i];
#pragma unroll
        for (int column = 0; column < kColumns; ++column) {
          const bool read = column * 64 + chunk_ * 8 < width_ && key >= 0;
          copy_async_16(place(to, i) + column * kSlots * 128, read ? row_of(from, key) + column * 128 : base, read);
        }
      }
    }
  }

  // Waits for this warp's copies, and replaces what is not finite by 0; sets poisoned [kRows] for such rows.
  __device__ void clean(uint32_t to, uint8_t* poisoned) const {
    wait_copies();
    for (int i = 0; i < kRowsOfLane; ++i)
      for (int column = 0; column < kColumns; ++column) {
        const uint32_t at = place(to, i) + column * kSlots * 128;
        Element x[8];
        load_shared_16(x, at);
        bool bad = false;
        for (auto& element : x) {
          if (isfinite(static_cast<float>(element))) continue;
          element = 0.0f;
          bad = true;
        }
        if (!bad) continue;
        store_shared_16(x, at);
        poisoned[first_ + i] = 1;
      }
  }

 private:
  __device__ const char* row_of(const char* from, int32_t key) const {
    return from + uint64_t{static_cast<uint32_t>(key)} * stride_;
  }
  // Bits 4 to 6 of a row's address are its chunk, which the swizzle turns; the rest is added.
  __device__ uint32_t place(uint32_t to, int i) const {
    return ((to + row_ * 128 + (chunk_ ^ row_) % 8 * 16) ^ i % 8 * 16) + i * 128;
  }
  __device__ static void copy_row(uint32_t to, const char* row) {
#pragma unroll
    for (int column = 0; column < kColumns; ++column) copy_async_16(to + column * kSlots * 128, row + column * 128);
  }

  const int chunk_, first_, row_;  // of the unit
  const uint32_t stride_;
  const int width_;
};

}  // namespace sparsek::cuda::sm90
