// A warpgroup, which attends with 64 of the rows that its CTA takes at once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>

#include "cuda/sm90/accumulators.cuh"
#include "cuda/sm90/ptx.cuh"
#include "cuda/sm90/short_forward/keys.cuh"
#include "cuda/sm90/short_forward/traits.cuh"
#include "cuda/sm90/units.cuh"
#include "cuda/sm90/wgmma.cuh"

namespace sparsek::cuda::sm90 {

template <typename Traits>
class ShortConsumer {
 public:
  using Element = typename Traits::Element;
  using Shared = typename Traits::Shared;
  using Stage = typename Traits::Stage;
  using Sums = float[Traits::kWidth / 2];

  __device__ ShortConsumer(const ShortForwardArguments& a, const ShortWork& work, Shared& shared)
      : a_(a), work_(work), s_(shared), index_(__shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0)) {}

  // Starts to bring the queries of a tile.
  __device__ void load_queries(int32_t tile) const {
    constexpr int kChunks = Traits::kWidth / 8, kRowsOfLane = 16 / (32 / kChunks);
    const int lane = threadIdx.x % 32, chunk = lane % kChunks;
    const int first = lane / kChunks * kRowsOfLane;  // row of the warp
    const int32_t row = first_row(tile) + first;
    const uint32_t column =
        warp_rows(tile) + chunk / 8 * (Traits::kTileRows * 128) + first * 128 + (chunk ^ first) % 8 * 16;
    const bool inside = chunk * 8 < a_.params.query.width;
    const char* base =
        a_.params.query.row(work_.batch, work_.query, work_.head) + (inside ? chunk : 0) * 8 * sizeof(Element);
    asm volatile("" : "+l"(base));  // one addition a row, not two
    __syncwarp();                   // rows of the output before have left
#pragma unroll
    for (int i = 0; i < kRowsOfLane; ++i)
      copy_async_16((column ^ i % 8 * 16) + i * 128, base + offset(a_.query_steps, row + i), inside);
    barrier_arrive_after_copies(s_.query_full[index_][tile % 2]);
  }

  __device__ void run(int32_t units, float threshold) {
    units_ = units;
    tiles_ = (work_.rows + Traits::kRows - 1) / Traits::kRows;
    const Ring keys = key_ring(), values = value_ring();
    const int32_t loaded = min(units, Traits::kStages);
    for (int32_t unit = 0; unit < loaded; ++unit) {
      if (brings(keys, unit)) load(keys, unit, unit);
      if (brings(values, unit)) load(values, unit, unit);
    }
    if (units <= Traits::kStages) {
      for (int32_t unit = 0; unit < units; ++unit) {
        barrier_wait(s_.key_full[unit], 0);
        barrier_wait(s_.value_full[unit], 0);
      }
      run_tiles<false>(threshold);
    } else {
      run_tiles<true>(threshold);
    }
  }

 private:
  static constexpr int kCopied = Traits::kSlots / 4;  // rows of a unit that a warp copies
  using Copier = RowCopier<Traits, Traits::kWidth, kCopied>;
  struct RowState {
    float reference[2];  // what logits are taken relative to: their maximum so far, or less by up to kLeeway
    float sum[2];        // this thread's part
  };

  // This warp's first row of a tile, and where the queries of its rows are, and the output on its way out.
  __device__ int32_t first_row(int32_t tile) const {
    return tile * Traits::kRows + static_cast<int32_t>(threadIdx.x) / 32 * 16;
  }
  __device__ uint32_t warp_rows(int32_t tile) const {
    return shared_address(s_.query[index_][tile % 2]) + threadIdx.x % 128 / 32 * (16 * 128);
  }
  // Of a row in bytes. Those that do not exist are the last one once more: they store the same.
  __device__ uint64_t offset(const RowSteps& steps, int32_t row) const {
    const uint32_t r = min(row, work_.rows - 1);
    return uint64_t{r >> a_.log_heads} * steps.query + uint64_t{r & ((1u << a_.log_heads) - 1)} * steps.head;
  }

  // The stages of the keys or the values. Units that all fit stay where they are, the first in the first stage; else
  // they come again for each tile, and each turn over the stages is another phase.
  struct Ring {
    const Rows& rows;
    Copier copier;
    Stage (&memory)[Traits::kStages];
    uint64_t (&full)[Traits::kStages], (&empty)[Traits::kStages];
    int which;                       // keys and values take turns on the warpgroups
    int stage = 0;                   // of the next product
    uint32_t phase = 0;              //
    int32_t step = 0;                // products so far
    int32_t unit = Traits::kStages;  // the next to be brought

    __device__ void wait() const { barrier_wait(full[stage], phase); }
  };
  __device__ Ring key_ring() const {
    return {a_.params.key, Copier(a_.params.key), s_.key, s_.key_full, s_.key_empty, 0};
  }
  __device__ Ring value_ring() const {
    return {a_.params.value, Copier(a_.params.value), s_.value, s_.value_full, s_.value_empty, 1};
  }

  // Whether this warpgroup is to bring a unit, and the start of that.
  __device__ bool brings(const Ring& ring, int32_t unit) const {
    return (2 * unit + ring.which) % Traits::kWarpgroups == index_;
  }
  __device__ void load(const Ring& ring, int32_t unit, int stage) const {
    ring.copier.copy(s_.keys + unit * Traits::kSlots + threadIdx.x % 128 / 32 * kCopied, true,
                     ring.rows.row(work_.batch, 0, work_.group), shared_address(ring.memory[stage]));
    barrier_arrive_after_copies(ring.full[stage]);
  }

  // After a product. A stage is filled again once the product after that is done too: then nobody waits long for the
  // slowest warpgroup.
  template <bool kStreams>
  __device__ void advance_ring(Ring& ring) const {
    if constexpr (kStreams) {
      __syncwarp();
      if (threadIdx.x % 32 == 0) barrier_arrive(ring.empty[ring.stage]);
      if (ring.step > 0 && ring.step - 1 + Traits::kStages < tiles_ * units_) {
        if (brings(ring, ring.unit)) {
          const int stage = ring.stage == 0 ? Traits::kStages - 1 : ring.stage - 1;
          barrier_wait(ring.empty[stage], (ring.step - 1) / Traits::kStages % 2);
          load(ring, ring.unit, stage);
        }
        if (++ring.unit == units_) ring.unit = 0;
      }
      ++ring.step;
      if (++ring.stage == Traits::kStages) ring.stage = 0, ring.phase ^= 1;
    } else {
      ++ring.stage;
    }
  }

  template <bool kStreams>
  __device__ void run_tiles(float threshold) {
    Ring keys = key_ring(), values = value_ring();
    for (int32_t tile = 0; tile < tiles_; ++tile) {
      if (tile + 1 < tiles_) load_queries(tile + 1);
      RowState state{{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
      Sums out;
#pragma unroll
      for (float& x : out) x = 0.0f;
      barrier_wait(s_.query_full[index_][tile % 2], tile / 2 % 2);
      if (!kStreams) {
        keys.stage = values.stage = 0;
        fence_async_proxy();
      }
      if (units_ > 0) attend<kStreams>(keys, values, shared_address(s_.query[index_][tile % 2]), state, out);
#pragma unroll
      for (int h = 0; h < 2; ++h) normalize(first_row(tile) + threadIdx.x % 32 / 4 + 8 * h, h, threshold, state, out);
      store(tile, out);
    }
  }

  // Unit by unit: while the weights of one are made, the tensor cores multiply the weights before with their values.
  template <bool kStreams>
  __device__ void attend(Ring& keys, Ring& values, uint32_t query, RowState& state, Sums& out) const {
    float logits[32], decay[2];
    uint32_t weights[4][4];
    if constexpr (kStreams) {
      keys.wait();
      fence_async_proxy();
    }
    // Accumulators are not to be touched between the fence and the wait: the compiler would wait for each product.
    mma_pin(logits);
    mma_fence();
    multiply_keys(query, keys, logits);
    mma_commit();
    mma_wait<0>();
    mma_pin(logits);
    advance_ring<kStreams>(keys);
    weigh(s_.bias, logits, state, decay);
    pack_weights<Element>(logits, weights);
    for (int32_t unit = 1; unit < units_; ++unit) {
      if constexpr (kStreams) {
        keys.wait();
        values.wait();
        fence_async_proxy();
      }
      mma_pin(logits);
      mma_pin(out);
      mma_fence();
      multiply_keys(query, keys, logits);
      mma_commit();
      multiply_values(weights, values, out);
      mma_commit();
      mma_wait<1>();  // the logits
      mma_pin(logits);
      advance_ring<kStreams>(keys);
      const bool rescale = weigh(s_.bias + unit * Traits::kSlots, logits, state, decay);
      mma_wait<0>();
      mma_pin(out);
      advance_ring<kStreams>(values);
      if (rescale) {
#pragma unroll
        for (int i = 0; i < Traits::kWidth / 2; ++i) out[i] *= decay[i / 2 % 2];
      }
      pack_weights<Element>(logits, weights);
    }
    if constexpr (kStreams) {
      values.wait();
      fence_async_proxy();
    }
    mma_pin(out);
    mma_fence();
    multiply_values(weights, values, out);
    mma_commit();
    mma_wait<0>();
    mma_pin(out);
    advance_ring<kStreams>(values);
  }

  // Turns logits into weights. Returns whether earlier sums are to be scaled, by `decay`.
  __device__ bool weigh(const float* biases, float (&logits)[32], RowState& state, float (&decay)[2]) const {
    float chains[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};  // two a row, since each maximum is a chain
    const float2* const bias = reinterpret_cast<const float2*>(biases) + threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float2 of_columns = bias[4 * j];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float& logit = logits[4 * j + e];
        logit = fmaf(logit, a_.factor, e % 2 == 0 ? of_columns.x : of_columns.y);
        chains[e] = fmaxf(chains[e], logit);
      }
    }
    float highest[2] = {fmaxf(chains[0], chains[1]), fmaxf(chains[2], chains[3])};
    const auto grows = [&](int h) { return highest[h] - state.reference[h] > kLeeway; };
    decay[0] = decay[1] = 1.0f;
    const bool rescale = __any_sync(~0u, grows(0) || grows(1));
    if (rescale) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        highest[h] = reduce_max(highest[h]);
        if (!grows(h)) continue;
        decay[h] = exp2_fast(state.reference[h] - highest[h]);
        state.reference[h] = highest[h];
        state.sum[h] *= decay[h];
      }
    }
    float shift[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) shift[h] = state.reference[h] == -INFINITY ? 0.0f : state.reference[h];
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      logits[i] = exp2_fast(logits[i] - shift[i / 2 % 2]);
      state.sum[i / 2 % 2] += logits[i];
    }
    return rescale;
  }

  // logits = queries keys^T, asynchronously.
  __device__ static void multiply_keys(uint32_t query, const Ring& keys, float (&logits)[32]) {
    const uint64_t left = matrix_descriptor(query, 16);
    const uint64_t right = matrix_descriptor(shared_address(keys.memory[keys.stage]), 16);
#pragma unroll
    for (int k = 0; k < Traits::kWidth / 16; ++k)
      multiply_shared<Element>(logits, advance(left, k / 4 * Traits::kTileRows * 128 + k % 4 * 32),
                               advance(right, k / 4 * Traits::kSlots * 128 + k % 4 * 32), k > 0);
  }

  // out += weights values, asynchronously.
  __device__ static void multiply_values(const uint32_t (&weights)[4][4], const Ring& values, Sums& out) {
    const uint64_t right = matrix_descriptor(shared_address(values.memory[values.stage]), Traits::kSlots * 128);
#pragma unroll
    for (int k = 0; k < 4; ++k) multiply_registers<Element>(out, weights[k], advance(right, k * 16 * 128));
  }

  // Divides by the sum, and stores the LSE.
  __device__ void normalize(int32_t row, int h, float threshold, const RowState& state, Sums& out) const {
    const ForwardParams<float>& p = a_.params;
    const float sum = reduce_sum(state.sum[h]);
    const bool is_nan = threshold != threshold || sum != sum;
    const float factor = is_nan ? NAN : sum == 0.0f ? 0.0f : __fdividef(1.0f, sum);
    if (threadIdx.x % 4 == 0) {
      float* lse = p.lse + (work_.batch * p.groups * p.heads_per_group + work_.head) * p.queries + work_.query;
      lse[offset({1, static_cast<uint32_t>(p.queries)}, row)] = is_nan ? NAN
                                                                : sum == 0.0f
                                                                    ? -INFINITY
                                                                    : (state.reference[h] + __log2f(sum)) * kLn2;
    }
#pragma unroll
    for (int i = 0; i < Traits::kWidth / 2; ++i)
      if (i / 2 % 2 == h) out[i] *= factor;
  }

  __device__ void store(int32_t tile, const Sums& out) const {
    const Rows& rows = a_.params.out;
    char* base = rows.row(work_.batch, work_.query, work_.head);
    asm volatile("" : "+l"(base));
    store_rows<Element, Traits::kWidth>(out, rows.element_size != sizeof(Element), static_cast<int>(rows.width) / 8,
                                        warp_rows(tile), Traits::kTileRows * 128, [&](int i) {
                                          char* row = base + offset(a_.out_steps, first_row(tile) + i);
                                          __builtin_assume(row != nullptr);
                                          return row;
                                        });
  }

  static constexpr float kLn2 = 0.6931471805599453f;

  const ShortForwardArguments& a_;
  const ShortWork& work_;
  Shared& s_;
  const int index_;
  int32_t units_, tiles_;
};

}  // namespace sparsek::cuda::sm90
