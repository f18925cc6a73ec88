// A consumer: a warpgroup that attends with 64 rows of each tile.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/sm90/forward/softmax.cuh"
#include "cuda/sm90/forward/traits.cuh"
#include "cuda/sm90/ptx.cuh"
#include "cuda/sm90/wgmma.cuh"

namespace sparsek::cuda::sm90 {

template <typename Traits>
class Consumer {
 public:
  using Element = typename Traits::Element;
  using Shared = typename Traits::Shared;
  using Sums = float[Traits::kWidth / 2];

  __device__ Consumer(const ForwardArguments& a, Shared& shared)
      : a_(a), s_(shared), index_(__shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0) - 1) {}

  __device__ void run() {
    if (index_ == Traits::kConsumers - 1) end_turn();  // the first one begins
    while (true) {
      barrier_wait(s_.query_full[query_.place], query_.phase);
      fence_async_proxy();
      const auto message = s_.message[query_.place];
      if (message == Traits::kDone) return;
      run_tile(message == Traits::kKeys);
      barrier_arrive_as_warp(s_.query_empty[query_.place], threadIdx.x % 32);
      query_.advance();
    }
  }

 private:
  __device__ void run_tile(bool has_keys) {
    const int lane = threadIdx.x % 32;
    const typename Traits::Row* rows = &s_.rows[query_.place][first_row()];
    RowState state;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      state.threshold[h] = rows[8 * h].threshold;
      // Weights of who sees nothing are to be 0, not to look as if they grew.
      const bool sees = rows[8 * h].out != nullptr && rows[8 * h].threshold == rows[8 * h].threshold;
      state.reference[h] = sees ? kNoReference : -kNoReference;
      state.sum[h] = 0.0f;
      state.poisoned[h] = false;
    }
    Sums out;
#pragma unroll
    for (float& x : out) x = 0.0f;
    if (has_keys) attend(state, out);
    bool finite = true;
#pragma unroll
    for (int h = 0; h < 2; ++h) finite = normalize(rows[8 * h], h, state, out) && finite;
    store(out);
    if constexpr (!Traits::kCareful) {
      const bool suspect = __any_sync(~0u, !finite);
      uint8_t* suspects = reinterpret_cast<uint8_t*>(a_.suspects + s_.place[query_.place] * Traits::kConsumers);
      if (lane == 0) suspects[threadIdx.x / 32 - 4] = suspect;
    }
  }

  // Unit by unit: the tensor cores multiply the weights of one with their values, and make the logits of the next.
  __device__ void attend(RowState& state, Sums& out) {
    float logits[32];
    uint32_t weights[4][4];
    if (a_.sign != 1.0f) sign_queries();
    barrier_wait(s_.key_full[unit_.place], unit_.phase);
    uint32_t flags = notes().flags;
    if (flags & Traits::kGathered) fence_async_proxy();
    mma_pin(logits);
    mma_fence();
    multiply_keys(logits);
    mma_commit();
    mma_wait<0>();
    mma_pin(logits);
    barrier_arrive_as_warp(s_.key_empty[unit_.place], threadIdx.x % 32);
    begin_weights(logits, state, weights);
    auto next = unit_;
    next.advance();
    // What barriers say takes a while to come: they are asked early.
    bool ready = is_ready(next);
    while (!(flags & Traits::kLast)) {
      if (!ready) {
        barrier_wait(s_.value_full[unit_.place], unit_.phase);
        barrier_wait(s_.key_full[next.place], next.phase);
      }
      const int values = unit_.place;
      unit_ = next;
      const uint32_t earlier_flags = flags;
      flags = notes().flags;
      if (Traits::kCareful || ((earlier_flags | flags) & Traits::kGathered)) fence_async_proxy();
      find_poison(weights, values, state);
      begin_turn();
      // Accumulators are not to be touched between the fence and the wait: the compiler would wait for each product.
      mma_pin(logits);
      mma_pin(out);
      mma_fence();
      multiply_values(weights, values, out);
      multiply_keys(logits);
      mma_commit();
      end_turn();
      mma_wait<0>();
      mma_pin(logits);
      mma_pin(out);
      mma_pin(weights);
      release_values(values);
      barrier_arrive_as_warp(s_.key_empty[unit_.place], threadIdx.x % 32);
      next.advance();
      // Often keys not seen need not be looked for: gates of 0 take them out, unless that makes something not finite.
      bool good = false;
      if (!Traits::kCareful && !(flags & Traits::kPlaced)) {
        float sums[2];
        if (flags & Traits::kSolid) {
          weigh<Traits, false>(logits, column(), a_.magnitude, state, sums, weights);
        } else {
          weigh<Traits, true>(logits, column(), a_.magnitude, state, sums, weights);
        }
        good = __all_sync(~0u, sums[0] <= kMostWeight && sums[1] <= kMostWeight);
        if (good) {
          state.sum[0] += sums[0];
          state.sum[1] += sums[1];
        }
      }
      ready = is_ready(next);
      if (!good) weigh_seen(logits, state, out, weights);
    }
    barrier_wait(s_.value_full[unit_.place], unit_.phase);
    if (Traits::kCareful || (flags & Traits::kGathered)) fence_async_proxy();
    find_poison(weights, unit_.place, state);
    mma_pin(out);
    mma_fence();
    multiply_values(weights, unit_.place, out);
    mma_commit();
    mma_wait<0>();
    mma_pin(out);
    mma_pin(weights);
    release_values(unit_.place);
    unit_ = next;
  }

  // All consumers go through the same units.
  __device__ void begin_turn() const {
    if constexpr (Traits::kTurns) named_barrier_sync(kTurnBarrier + index_, 256);
  }
  __device__ void end_turn() const {
    const int next = index_ + 1 < Traits::kConsumers ? index_ + 1 : 0;
    if constexpr (Traits::kTurns) named_barrier_arrive(kTurnBarrier + next, 256);
  }

  __device__ void release_values(int place) const {
    if constexpr (Traits::kCareful) {  // each lane has read which are poisoned
      barrier_arrive(s_.value_empty[place]);
    } else {
      barrier_arrive_as_warp(s_.value_empty[place], threadIdx.x % 32);
    }
  }

  // Whether values of the unit and keys of the next one are there.
  __device__ bool is_ready(const Ring<Traits::kStages>& next) const {
    const bool values = barrier_test(s_.value_full[unit_.place], unit_.phase);
    return barrier_test(s_.key_full[next.place], next.phase) && values;
  }

  // Takes keys that are not seen out of the logits.
  __device__ void mask_unit(float (&logits)[32], const RowState& state) const {
    int32_t position[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) position[h] = s_.rows[query_.place][first_row() + 8 * h].position;
    mask<Traits>(logits, column(), notes().span, position, state);
  }

  // Makes the weights of a tile's first unit.
  __device__ void begin_weights(float (&logits)[32], RowState& state, uint32_t (&weights)[4][4]) const {
    const bool all[2] = {true, true};
    float decay[2];
    mask_unit(logits, state);
    raise<Traits>(logits, all, a_.magnitude, state, decay);
    weigh<Traits, true>(logits, column(), a_.magnitude, state, state.sum, weights);
  }

  // Makes weights where it matters which keys are seen. What a row's weights are relative to follows from what it sees
  // alone.
  __device__ void weigh_seen(float (&logits)[32], RowState& state, Sums& out, uint32_t (&weights)[4][4]) const {
    float sums[2];
    bool fail[2];
    mask_unit(logits, state);
    weigh<Traits, true>(logits, column(), a_.magnitude, state, sums, weights);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t failing = __ballot_sync(~0u, !(sums[h] <= kMostWeight));
      fail[h] = failing >> (threadIdx.x % 32 & ~3) & 15;
    }
    if (__any_sync(~0u, fail[0] || fail[1])) {
      float decay[2];
      raise<Traits>(logits, fail, a_.magnitude, state, decay);
#pragma unroll
      for (int i = 0; i < Traits::kWidth / 2; ++i) out[i] *= decay[i / 2 % 2];
      weigh<Traits, true>(logits, column(), a_.magnitude, state, sums, weights);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) state.sum[h] += sums[h];
  }

  // Gives the queries the sign of the scale.
  __device__ void sign_queries() const {
    const int row = index_ * 64 + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 16;
    const uint32_t place = shared_address(s_.query[query_.place]) + row * 128;
    for (int k = 0; k < Traits::kWidth / 16; ++k) {
      const int chunk = 2 * k + threadIdx.x % 32 / 16;
      const uint32_t matrices = place + chunk / 8 * (Traits::kRows * 128) + (chunk ^ row) % 8 * 16;
      uint32_t pairs[4];
      load_matrices(pairs, matrices);
      for (uint32_t& pair : pairs) pair = multiply_pair<Element>(pair, a_.sign);
      __syncwarp();
      store_matrices(matrices, pairs);
    }
    fence_async_proxy();
    named_barrier_sync(kSignBarrier + index_, 128);
  }

  // logits = queries keys^T, asynchronously.
  __device__ void multiply_keys(float (&logits)[32]) const {
    const uint64_t query = matrix_descriptor(shared_address(s_.query[query_.place]) + index_ * 64 * 128, 16);
    const uint64_t key = matrix_descriptor(shared_address(s_.key[unit_.place]), 16);
#pragma unroll
    for (int k = 0; k < Traits::kWidth / 16; ++k)
      multiply_shared<Element>(logits, advance_low(query, k / 4 * Traits::kRows * 128 + k % 4 * 32),
                               advance_low(key, k / 4 * Traits::kSlots * 128 + k % 4 * 32), k > 0);
  }

  // out += weights values, asynchronously.
  __device__ void multiply_values(const uint32_t (&weights)[4][4], int place, Sums& out) const {
    const uint64_t value = matrix_descriptor(shared_address(s_.value[place]), Traits::kSlots * 128);
#pragma unroll
    for (int k = 0; k < 4; ++k) multiply_registers<Element>(out, weights[k], advance(value, k * 16 * 128));
  }

  // Rows that give weight to a value that was not finite become NaN.
  __device__ void find_poison(const uint32_t (&weights)[4][4], int place, RowState& state) const {
    if constexpr (Traits::kCareful) {
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint8_t* poisoned = &s_.poisoned[place][16 * k + i / 2 * 8 + 2 * (threadIdx.x % 4)];
          const bool low = poisoned[0] && (weights[k][i] & 0x7fff) != 0;
          const bool high = poisoned[1] && (weights[k][i] >> 16 & 0x7fff) != 0;
          if (low || high) state.poisoned[i % 2] = true;
        }
    }
  }

  // Divides by the sum, and stores the LSE. Returns whether all of the row is finite, or no product is to blame.
  __device__ bool normalize(const typename Traits::Row& row, int h, const RowState& state, Sums& out) const {
    const float sum = reduce_sum(state.sum[h]);
    const bool is_nan = row.threshold != row.threshold;
    bool poisoned = is_nan;
    if constexpr (Traits::kCareful) poisoned = reduce_sum(state.poisoned[h] ? 1.0f : 0.0f) > 0.0f || is_nan;
    const float factor = poisoned ? NAN : sum == 0.0f ? 0.0f : __fdividef(1.0f, sum);
    if (threadIdx.x % 4 == 0 && row.lse != nullptr)
      *row.lse = is_nan || sum != sum ? NAN : sum == 0.0f ? -INFINITY : (state.reference[h] + log2f(sum)) * kLn2;
    float zeros[4] = {};  // several, since each sum is a chain
#pragma unroll
    for (int i = 0; i < Traits::kWidth / 2; ++i)
      if (i / 2 % 2 == h) {
        zeros[i / 4 % 2 * 2 + i % 2] = fmaf(out[i], 0.0f, zeros[i / 4 % 2 * 2 + i % 2]);
        out[i] *= factor;
      }
    return zeros[0] + zeros[1] + zeros[2] + zeros[3] == 0.0f || row.out == nullptr;
  }

  // Stores this warp's 16 rows: by way of its queries' shared memory, so that each row goes out in whole.
  __device__ void store(const Sums& out) const {
    const int lane = threadIdx.x % 32, first = index_ * 64 + threadIdx.x % 128 / 32 * 16;
    const typename Traits::Row* rows = &s_.rows[query_.place][first];
    const int chunks = static_cast<int>(a_.params.out.width) / 8;
    if (a_.params.out.element_size != sizeof(Element))
      return store_floats<Traits::kWidth>(out, chunks, [&](int row) { return rows[row].out; });
    const WarpRows staged{shared_address(s_.query[query_.place]) + first * 128, Traits::kRows * 128};
    stage_rows<Element, Traits::kWidth>(out, staged);
    __syncwarp();
    constexpr int kChunks = Traits::kWidth / 8, kRowsAtOnce = 32 / kChunks, kSteps = 16 / kRowsAtOnce;
    const int chunk = lane % kChunks;
    uint4 x[kSteps];
    uint4* to[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int row = i * kRowsAtOnce + lane / kChunks;
      to[i] = reinterpret_cast<uint4*>(rows[row].out);
      load_shared_16(x[i], staged.chunk_of(row, chunk));
    }
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
      if (to[i] != nullptr && chunk < chunks) to[i][chunk] = x[i];
  }

  // Of the unit whose weights are made.
  __device__ const typename Traits::Notes& notes() const { return s_.notes[Traits::note_of(unit_)]; }
  __device__ const typename Traits::Column& column() const { return notes().column[threadIdx.x % 4]; }

  __device__ int first_row() const { return index_ * 64 + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4; }

  const ForwardArguments& a_;
  Shared& s_;
  const int index_;
  Ring<Traits::kQueryStages> query_;
  Ring<Traits::kStages> unit_;
};

}  // namespace sparsek::cuda::sm90
