// A loader: a warp that brings rows to shared memory, either those of keys and queries, or those of values and of the
// gradients of outputs, the latter with what the consumers must know of the queries.
#pragma once

#include <cfloat>
#include <cmath>

#include "cuda/sm90/backward/traits.cuh"
#include "cuda/sm90/launch.h"
#include "cuda/sm90/ptx.cuh"
#include "cuda/sm90/units.cuh"

namespace sparsek::cuda::sm90 {

template <typename Traits, bool kGrads>
class Loader {
 public:
  using Element = typename Traits::Element;

  __device__ Loader(const BackwardArguments& a, typename Traits::Shared& shared)
      : p_(a.params), s_(shared), lane_(static_cast<int>(threadIdx.x) % 32) {}

  __device__ void run() {
    constexpr int kStages = kGrads ? Traits::kGradStages : Traits::kQueryStages;
    constexpr int kAhead = 4;  // tiles before the end of a unit at which the next one is looked up
    Ring<Traits::kUnits> units;
    Ring<1> keys;
    Ring<kStages> stage;
    const int32_t heads = static_cast<int32_t>(p_.heads_per_group);
    while (true) {
      barrier_wait(s_.unit_full[units.place], units.phase);
      const Unit& unit = s_.units[units.place];
      if (unit.done) return;
      bool asked = false, has_keys = false;
      // After the first tile, whose place is free before that of the keys.
      const auto bring_keys = [&] {
        if (has_keys) return;
        has_keys = true;
        barrier_wait(s_.keys_empty, keys.phase ^ 1);
        load_keys(unit);
        arrive(kGrads ? s_.value_full : s_.key_full);
        keys.advance();
      };
      const auto ask = [&] {
        if (kGrads || asked) return;
        if (lane_ == 0) barrier_arrive(s_.unit_wanted);
        asked = true;
      };
      for_each_tile_of(unit, heads, [&](int32_t head, int32_t tile) {
        if (head + 1 == heads && tile + kAhead >= unit.end_tile) ask();
        if constexpr (kGrads) {
          const RowsOfLane rows = load_rows(unit, head, tile);
          barrier_wait(s_.grad_empty[stage.place], stage.phase ^ 1);
          load_tile(unit, head, tile, stage.place);
          store_rows(unit, tile, rows, s_.rows[stage.place]);
          arrive(s_.grad_full[stage.place]);
        } else {
          barrier_wait(s_.query_empty[stage.place], stage.phase ^ 1);
          load_tile(unit, head, tile, stage.place);
          arrive(s_.query_full[stage.place]);
        }
        stage.advance();
        bring_keys();
      });
      bring_keys();
      ask();
      barrier_arrive_as_warp(s_.unit_empty[units.place], lane_);
      units.advance();
    }
  }

 private:
  static constexpr int kChunks = Traits::kWidth / 8, kStep = 32 / kChunks;
  static constexpr int kRowsOfLane = Traits::kRows / 32;
  struct RowsOfLane {
    float lse[kRowsOfLane], delta[kRowsOfLane], threshold[kRowsOfLane];
  };

  // Once what this warp has copied is there, for the tensor cores too, which read through another proxy. Nothing else
  // is to be done meanwhile, and consumers need not order what they see.
  __device__ void arrive(uint64_t& barrier) const {
    wait_copies();
    fence_async_proxy();
    barrier_arrive_as_warp(barrier, lane_);
  }

  __device__ RowsOfLane load_rows(const Unit& unit, int32_t head, int32_t tile) const {
    RowsOfLane rows;
#pragma unroll
    for (int n = 0; n < kRowsOfLane; ++n) {
      const int32_t position = tile * Traits::kRows + lane_ + 32 * n;
      rows.lse[n] = INFINITY;
      rows.delta[n] = 0.0f;
      rows.threshold[n] = NAN;
      if (position < unit.first_query || position >= unit.end_query) continue;
      const int64_t row = unit.lse_row + head * p_.queries + position;
      rows.lse[n] = p_.lse[row] * static_cast<float>(kLog2e);
      rows.delta[n] = p_.delta[row];
      rows.threshold[n] = p_.threshold[unit.threshold_row + position];
    }
    return rows;
  }

  __device__ void store_rows(const Unit& unit, int32_t tile, const RowsOfLane& from,
                             TileRows<Traits::kRows>& rows) const {
    const Pattern& pattern = p_.pattern;
#pragma unroll
    for (int n = 0; n < kRowsOfLane; ++n) {
      const int r = lane_ + 32 * n;
      const float threshold = from.threshold[n];
      float gates_by = fminf(threshold, FLT_MAX);  // pinned keys have gate 1 also where they take all of k
      if (threshold != threshold) {
        gates_by = NAN;
      } else if (pattern.hard) {
        gates_by = pattern.causal ? static_cast<float>(tile * Traits::kRows + r - unit.view.begin) : 0.0f;
      }
      rows.lse[r] = from.lse[n];
      rows.delta[r] = from.delta[n];
      rows.threshold[r] = gates_by;
      rows.soft_threshold[r] = threshold;
    }
  }

  __device__ void load_keys(const Unit& unit) const {
    const Rows& source = kGrads ? p_.value : p_.key;
    const char* base = source.row(unit.sequence.batch, unit.sequence.key_begin, unit.group);
    const uint32_t to = shared_address(kGrads ? s_.value : s_.key);
    const bool whole = unit.key[kKeys - 1] >= 0;  // keys that are not there come last
    RowCopier<Element, Traits::kWidth, kKeys, kKeys>(source).copy(unit.key, whole, base, to);
    if constexpr (Traits::kCareful && !kGrads) clean<kKeys>(to, shared_address(s_.clean_key), s_.bad_key);
  }

  __device__ void load_tile(const Unit& unit, int32_t head, int32_t tile, int place) const {
    const Rows& source = kGrads ? p_.grad_out : p_.query;
    const int64_t stride = source.stride[1] * static_cast<int64_t>(sizeof(Element));
    const int32_t first = tile * Traits::kRows;
    const int32_t shift = p_.pattern.causal ? unit.sequence.shift() : 0;
    const char* base = source.row(unit.sequence.batch, unit.sequence.query_begin - shift + first,
                                  unit.group * p_.heads_per_group + head);
    const uint32_t to = kGrads ? shared_address(s_.grad[place]) : shared_address(s_.query[place]);
    const int32_t begin = unit.first_query - first, end = unit.end_query - first;
    if (begin <= 0 && end >= Traits::kRows && source.width == Traits::kWidth) {
      constexpr int kRowsOfGroup = Traits::kRows / kStep;
      static_assert(kRowsOfGroup % 8 == 0);
      const int chunk = lane_ % kChunks, row = lane_ / kChunks * kRowsOfGroup;
      const char* from = base + row * stride + chunk * 16;
      // Bits 4 to 6 of a row's address are its chunk, which the swizzle turns; the rest is added.
      const uint32_t column = to + chunk / 8 * (Traits::kRows * 128) + row * 128 + chunk % 8 * 16;
#pragma unroll 8
      for (int i = 0; i < kRowsOfGroup; ++i) {
        copy_async_16((column ^ i % 8 * 16) + i * 128, from);
        from += stride;
      }
    } else {
      copy<Traits::kRows>(to, source, [&](int r) { return r < begin || r >= end ? nullptr : base + r * stride; });
    }
    if constexpr (Traits::kCareful) {
      if constexpr (kGrads) {
        clean<Traits::kRows>(to, shared_address(s_.clean_grad), s_.bad_grad);
      } else {
        clean<Traits::kRows>(to, shared_address(s_.clean_query), s_.bad_query);
      }
    }
  }

  // Rows at row_of(r), zeros where that is null; columns from the width on become zeros.
  template <int kCount, typename RowOf>
  __device__ void copy(uint32_t to, const Rows& source, const RowOf& row_of) const {
    const int chunk = lane_ % kChunks, first = lane_ / kChunks;
    const uint32_t column = to + chunk / 8 * (kCount * 128);
    const bool inside = chunk * 8 < source.width;
#pragma unroll 4
    for (int i = 0; i < kCount / kStep; ++i) {
      const int r = first + i * kStep;
      const char* row = row_of(r);
      const bool read = inside && row != nullptr;
      copy_async_16(column + r * 128 + ((chunk ^ r) % 8) * 16, read ? row + chunk * 16 : source.data, read);
    }
  }

  // Copies what this warp has loaded, with 0 for what is not finite, and marks such rows.
  template <int kCount>
  __device__ void clean(uint32_t from, uint32_t to, uint8_t* bad) const {
    for (int r = lane_; r < kCount; r += 32) bad[r] = 0;
    wait_copies();
    __syncwarp();
    const int chunk = lane_ % kChunks, first = lane_ / kChunks;
    for (int i = 0; i < kCount / kStep; ++i) {
      const int r = first + i * kStep;
      const uint32_t place = chunk / 8 * (kCount * 128) + r * 128 + ((chunk ^ r) % 8) * 16;
      Element x[8];
      load_shared_16(x, from + place);
      for (auto& element : x) {
        if (isfinite(static_cast<float>(element))) continue;
        element = 0.0f;
        bad[r] = 1;
      }
      store_shared_16(x, to + place);
    }
  }

  const BackwardParams<float>& p_;
  typename Traits::Shared& s_;
  const int lane_;
};

}  // namespace sparsek::cuda::sm90
