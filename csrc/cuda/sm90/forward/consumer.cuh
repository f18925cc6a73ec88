// A consumer: a warpgroup that attends with 64 rows of each tile.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/sm90/forward/softmax.cuh"
#include "cuda/sm90/forward/traits.cuh"
#include "cuda/sm90/ptx.cuh"

namespace sparsek::cuda::sm90 {

template <typename Traits>
class Consumer {
 public:
  using Element = typename Traits::Element;
  using Shared = typename Traits::Shared;
  using Notes = typename Traits::Notes;

  __device__ Consumer(const ForwardArguments& a, Shared& shared)
      : a_(a), s_(shared), index_(static_cast<int>(threadIdx.x) / 128 - 1) {}

  __device__ void run() {
    if (index_ == 1) give_turn();  // the first turn is the other one's
    while (true) {
      wait(s_.query_full, query_phase_);
      if (s_.message == Traits::kDone) return;
      run_tile(s_.message == Traits::kKeys);
      query_phase_ ^= 1;
      if (++place_ == Traits::kRowPlaces) place_ = 0;
    }
  }

 private:
  __device__ void run_tile(bool has_keys) {
    const int lane = threadIdx.x % 32;
    const int row = index_ * 64 + threadIdx.x % 128 / 32 * 16 + lane / 4;
    const typename Traits::Row* rows = &s_.rows[place_][row];
    RowState state;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      state.threshold[h] = rows[8 * h].threshold;
      state.position[h] = rows[8 * h].position;
      state.maximum[h] = -INFINITY;
      state.sum[h] = 0.0f;
      state.poisoned[h] = false;
    }
    float out[Traits::kValueWidth / 2];
#pragma unroll
    for (float& x : out) x = 0.0f;
    const int64_t work = s_.work[place_];
    if (has_keys) {
      attend(state, out);
    } else {
      release(s_.query_empty);
    }
    bool finite = true;
#pragma unroll
    for (int h = 0; h < 2; ++h) finite = store(rows[8 * h], h, state, out) && finite;
    if constexpr (!Traits::kCareful) {
      const bool suspect = __any_sync(~0u, !finite);
      if (lane == 0) reinterpret_cast<uint8_t*>(a_.suspects + work)[threadIdx.x / 32 - 4] = suspect;
    }
  }

  __device__ void attend(RowState& state, float (&out)[Traits::kValueWidth / 2]) {
    float logits[64], decay[2];
    uint32_t weights[8][4];
    uint32_t flags = 0;
    for (bool first = true; !(flags & Traits::kLast); first = false) {
      wait(s_.key_full[key_stage_], key_phase_);
      take_turn();
      multiply_keys(logits);
      if (!first) {
        wait(s_.value_full[value_stage_], value_phase_);
        find_poison(weights, state);
        multiply_values(weights, out);
      }
      mma_commit();
      give_turn();
      mma_wait<1>();  // the logits
      mma_pin(logits);
      release(s_.key_empty[key_stage_]);
      flags = s_.notes[note_].flags;
      if (flags & Traits::kLast) release(s_.query_empty);
      weigh_unit(flags, logits, state, decay);
      advance_key();
      mma_wait<0>();
      mma_pin(out);
      if (!first) {
        release(s_.value_empty[value_stage_]);
        advance_value();
#pragma unroll
        for (int i = 0; i < Traits::kValueWidth / 2; ++i) out[i] *= decay[i / 2 % 2];
      }
      pack_weights(logits, weights);
    }
    wait(s_.value_full[value_stage_], value_phase_);
    find_poison(weights, state);
    multiply_values(weights, out);
    mma_commit();
    mma_wait<0>();
    mma_pin(out);
    release(s_.value_empty[value_stage_]);
    advance_value();
  }

  // logits = queries keys^T, asynchronously.
  __device__ void multiply_keys(float (&logits)[64]) {
    const uint64_t query = matrix_descriptor(opaque(shared_address(s_.query)) + index_ * 64 * 128, 16);
    const uint64_t key = matrix_descriptor(shared_address(s_.key[key_stage_]), 16);
    mma_pin(logits);
    mma_fence();
#pragma unroll
    for (int k = 0; k < Traits::kWidth / 16; ++k)
      multiply_shared<Element>(logits, advance(query, k / 4 * Traits::kRows * 128 + k % 4 * 32),
                               advance(key, k / 4 * Traits::kSlots * 128 + k % 4 * 32), k > 0);
    mma_commit();
  }

  // out += weights values, asynchronously.
  __device__ void multiply_values(uint32_t (&weights)[8][4], float (&out)[Traits::kValueWidth / 2]) {
    const uint64_t value = matrix_descriptor(shared_address(s_.value[value_stage_]), Traits::kSlots * 128);
    mma_pin(out);
    mma_fence();
#pragma unroll
    for (int k = 0; k < Traits::kSlots / 16; ++k)
      multiply_registers<Element>(out, weights[k], advance(value, k * 16 * 128), true);
  }

  // Rows that give weight to a value that was not finite become NaN.
  __device__ void find_poison(const uint32_t (&weights)[8][4], RowState& state) const {
    if constexpr (Traits::kCareful) {
#pragma unroll
      for (int k = 0; k < 8; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint8_t* poisoned = &s_.poisoned[value_stage_][16 * k + i / 2 * 8 + 2 * (threadIdx.x % 4)];
          const bool low = poisoned[0] && (weights[k][i] & 0x7fff) != 0;
          const bool high = poisoned[1] && (weights[k][i] >> 16 & 0x7fff) != 0;
          if (low || high) state.poisoned[i % 2] = true;
        }
    }
  }

  __device__ void weigh_unit(uint32_t flags, float (&logits)[64], RowState& state, float (&decay)[2]) {
    const Notes& notes = s_.notes[note_];
    note_ = (note_ + 1) % Traits::kNotes;
    if (a_.sign != 1.0f) {
#pragma unroll
      for (float& x : logits) x *= a_.sign;
    }
    const int32_t window = static_cast<int32_t>(a_.params.pattern.window);
    if (flags & Traits::kSolid) {
      weigh<Traits, Unit::kSolid>(logits, notes, window, a_.magnitude, state, decay);
    } else if (flags & Traits::kSeen) {
      weigh<Traits, Unit::kSeen>(logits, notes, window, a_.magnitude, state, decay);
    } else if (flags & Traits::kEntering) {
      weigh<Traits, Unit::kEntering>(logits, notes, window, a_.magnitude, state, decay);
    } else if (flags & Traits::kWindow) {
      weigh<Traits, Unit::kWindow>(logits, notes, window, a_.magnitude, state, decay);
    } else {
      weigh<Traits, Unit::kGated>(logits, notes, window, a_.magnitude, state, decay);
    }
  }

  // Weights as the left operand of a product: the layouts match once neighbours share a register.
  __device__ static void pack_weights(const float (&logits)[64], uint32_t (&weights)[8][4]) {
#pragma unroll
    for (int k = 0; k < 8; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) weights[k][i] = pack<Element>(logits[8 * k + 2 * i], logits[8 * k + 2 * i + 1]);
  }

  // Returns whether all that it stores is finite, or no product is to blame.
  __device__ bool store(const typename Traits::Row& row, int h, const RowState& state,
                        const float (&out)[Traits::kValueWidth / 2]) const {
    const float sum = reduce_sum(state.sum[h]);
    const bool is_nan = row.threshold != row.threshold;
    bool poisoned = is_nan;
    if constexpr (Traits::kCareful) poisoned = reduce_sum(state.poisoned[h] ? 1.0f : 0.0f) > 0.0f || is_nan;
    if (row.out == nullptr) return true;
    const float factor = poisoned ? NAN : sum == 0.0f ? 0.0f : 1.0f / sum;
    const int lane = threadIdx.x % 4;
    if (lane == 0)
      *row.lse = is_nan || sum != sum ? NAN
                 : sum == 0.0f        ? -INFINITY
                                      : (state.maximum[h] * a_.magnitude + log2f(sum)) * kLn2;
    if (a_.params.out.element_size == sizeof(Element)) {
      store_row(row.out, factor, h, out, [](float x, float y) { return pack<Element>(x, y); });
    } else {
      store_row(row.out, factor, h, out, [](float x, float y) { return float2{x, y}; });
    }
    float zero = 0.0f;
#pragma unroll
    for (int i = 0; i < Traits::kValueWidth / 2; ++i)
      if (i / 2 % 2 == h) zero = fmaf(out[i], 0.0f, zero);
    return zero == 0.0f;
  }

  // Pairs of neighbouring columns, as what `make` makes of them.
  template <typename Make>
  __device__ void store_row(char* to, float factor, int h, const float (&out)[Traits::kValueWidth / 2],
                            const Make& make) const {
    using Pair = decltype(make(0.0f, 0.0f));
    Pair* pairs = reinterpret_cast<Pair*>(to) + threadIdx.x % 4;
    const int count = static_cast<int>(a_.params.out.width) / 8;
#pragma unroll
    for (int j = 0; j < Traits::kValueWidth / 8; ++j)
      if (j < count) pairs[4 * j] = make(out[4 * j + 2 * h] * factor, out[4 * j + 2 * h + 1] * factor);
  }

  // Keeps the compiler from computing what follows from `x` ahead of the loop: registers are scarce.
  __device__ static uint32_t opaque(uint32_t x) {
    asm volatile("" : "+r"(x));
    return x;
  }
  __device__ static void wait(uint64_t& barrier, uint32_t phase) {
    barrier_wait(barrier, phase);
    fence_async_proxy();
  }
  __device__ void release(uint64_t& barrier) const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
  }
  __device__ void advance_key() {
    if (++key_stage_ == Traits::kStages) key_stage_ = 0, key_phase_ ^= 1;
  }
  __device__ void advance_value() {
    if (++value_stage_ == Traits::kStages) value_stage_ = 0, value_phase_ ^= 1;
  }
  __device__ void take_turn() const { named_barrier_sync(kTurnBarrier + index_, 256); }
  __device__ void give_turn() const { named_barrier_arrive(kTurnBarrier + (index_ ^ 1), 256); }

  static constexpr float kLn2 = 0.6931471805599453f;

  const ForwardArguments& a_;
  Shared& s_;
  const int index_;
  int place_ = 0, note_ = 0, key_stage_ = 0, value_stage_ = 0;
  uint32_t key_phase_ = 0, value_phase_ = 0, query_phase_ = 0;
};

}  // namespace sparsek::cuda::sm90
