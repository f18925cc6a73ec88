// The writer: a warp that adds what each unit gives to the gradients of a tile of queries to the sums in global memory,
// when it is this unit's turn: sums are taken in one order every time.
#pragma once

#include "cuda/sm90/backward/traits.cuh"
#include "cuda/sm90/ptx.cuh"

namespace sparsek::cuda::sm90 {

template <typename Traits>
class Writer {
 public:
  __device__ Writer(const BackwardArguments& a, typename Traits::Shared& shared)
      : a_(a), s_(shared), lane_(static_cast<int>(threadIdx.x) % 32) {}

  __device__ void run() {
    Ring<Traits::kUnits> units;
    while (true) {
      barrier_wait(s_.unit_full[units.place], units.phase);
      const Unit& unit = s_.units[units.place];
      if (unit.done) return;
      write(unit);
      barrier_arrive_as_warp(s_.unit_empty[units.place], lane_);
      units.advance();
    }
  }

 private:
  __device__ void write(const Unit& unit) {
    const Pattern& pattern = a_.params.pattern;
    const int64_t heads = a_.params.heads_per_group;
    const TileRange near = range(unit, unit.number + 1 + lane_);
    int32_t* const turns = a_.windows ? a_.window_turns : a_.turns;
    const bool stored = !a_.windows && pattern.window > 0;  // by the windows
    for_each_tile_of(unit, static_cast<int32_t>(heads), [&](int32_t head, int32_t tile) {
      const int32_t before = find_before(unit, near, tile);
      if (lane_ != 0) return;
      const int64_t place = (unit.group * heads + head) * a_.num_tiles + unit.tile + tile;
      float* const sums = a_.tile_sums + place * tile_floats(Traits::kWidth);
      while (load_acquire(turns + place) != before) {
      }
      fence_async_proxy_global();
      barrier_wait(s_.sums_full, phase_);
      if (before == 0 && !stored) {
        bulk_store(sums, shared_address(s_.sums), sizeof(s_.sums));
      } else {
        bulk_add(sums, shared_address(s_.sums), sizeof(s_.sums));
      }
      bulk_commit();
      bulk_wait_read();
      barrier_arrive(s_.sums_empty);
      bulk_wait();
      fence_async_proxy_global();
      store_release(turns + place, unit.number + 1);
      phase_ ^= 1;
    });
  }

  __device__ TileRange range(const Unit& unit, int32_t number) const {
    if (number >= unit.count) return {0, 0};
    return find_tiles<Traits::kRows>(unit, a_.params.pattern, number);
  }

  // 1 + the unit that adds to a tile right before this one, 0 if there is none. Later units come first.
  __device__ int32_t find_before(const Unit& unit, TileRange near, int32_t tile) const {
    for (int32_t first = unit.number + 1; first < unit.count; first += 32) {
      if (first != unit.number + 1) near = range(unit, first + lane_);
      const uint32_t found = __ballot_sync(~0u, near.has(tile));
      if (found != 0) return first + __ffs(found);
    }
    return 0;
  }

  __device__ static int32_t load_acquire(const int32_t* from) {
    int32_t x;
    asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
    return x;
  }
  __device__ static void store_release(int32_t* to, int32_t x) {
    asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(to), "r"(x) : "memory");
  }

  const BackwardArguments& a_;
  typename Traits::Shared& s_;
  const int lane_;
  uint32_t phase_ = 0;
};

}  // namespace sparsek::cuda::sm90
