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
      : a_(a),
        work_(work),
        s_(shared),
        index_(static_cast<int>(threadIdx.x) / 128),
        keys_{a.params.key, shared.key, shared.key_full, shared.key_empty, 0},
        values_{a.params.value, shared.value, shared.value_full, shared.value_empty, 1} {}

  // Starts to bring the queries of one tile of this warpgroup, the first rows of which are `row`, and `row` + kRows of
  // the next.
  __device__ void load_queries(int32_t row) {
    constexpr int kChunks = Traits::kWidth / 8, kRowsOfLane = 16 / (32 / kChunks);
    const int lane = threadIdx.x % 32, chunk = lane % kChunks;
    const int first = threadIdx.x % 128 / 32 * 16 + lane / kChunks * kRowsOfLane;
    const int buffer = row / Traits::kRows % 2;
    const uint32_t column =
        shared_address(s_.query[index_][buffer]) + chunk / 8 * (Traits::kTileRows * 128) + first * 128;
    const bool inside = chunk * 8 < a_.params.query.width;
    __syncwarp();  // rows of the output before have left
#pragma unroll
    for (int i = 0; i < kRowsOfLane; ++i) {
      const Place place = find(min(row + first + i, work_.rows - 1));
      const char* source = a_.params.query.row(work_.batch, place.query, place.head);
      copy_async_16(column + i * 128 + ((chunk ^ (first + i)) % 8) * 16, source + (inside ? chunk * 16 : 0), inside);
    }
    barrier_arrive_after_copies(s_.query_full[index_][buffer]);
  }

  __device__ void run(int32_t units, float threshold) {
    units_ = units;
    streams_ = units > Traits::kStages;
    const int32_t tiles = (work_.rows + Traits::kRows - 1) / Traits::kRows;
    steps_ = tiles * units;
    for (int32_t unit = 0; unit < min(units, Traits::kStages); ++unit) {
      if (brings(keys_, unit)) load(keys_, unit, unit);
      if (brings(values_, unit)) load(values_, unit, unit);
    }
    for (int32_t tile = 0; tile < tiles; ++tile) {
      const int32_t row = tile * Traits::kRows + index_ * Traits::kTileRows;
      if (tile + 1 < tiles) load_queries(row + Traits::kRows);
      run_tile(row, threshold);
    }
  }

 private:
  struct Place {
    int64_t query, head;
  };
  struct RowState {
    float reference[2];  // what logits are taken relative to: their maximum so far, or less by up to kLeeway
    float sum[2];        // this thread's part
  };

  __device__ Place find(int32_t row) const {
    const int64_t r = work_.begin + row;
    return {r >> a_.log_heads, work_.head + (r & ((1 << a_.log_heads) - 1))};
  }

  // The stages of the keys or the values. Units that all fit stay where they are; else each turn over the stages is
  // another phase.
  struct Ring {
    const Rows& rows;
    Stage (&memory)[Traits::kStages];
    uint64_t (&full)[Traits::kStages], (&empty)[Traits::kStages];
    int which;      // keys and values take turns on the warpgroups
    int stage = 0;  // of the next product
    uint32_t phase = 0;
    int32_t step = 0;                // products so far, where units are brought again
    int32_t unit = Traits::kStages;  // the next to be brought
  };

  // Whether this warpgroup is to bring a unit, and the start of that.
  __device__ bool brings(const Ring& ring, int32_t unit) const {
    return (2 * unit + ring.which) % Traits::kWarpgroups == index_;
  }
  __device__ void load(const Ring& ring, int32_t unit, int stage) const {
    const RowCopier<Traits, Traits::kWidth, kCopied> copier(ring.rows);
    copier.copy(s_.keys + unit * Traits::kSlots + threadIdx.x % 128 / 32 * kCopied, true,
                ring.rows.row(work_.batch, 0, work_.group), shared_address(ring.memory[stage]));
    barrier_arrive_after_copies(ring.full[stage]);
  }

  // After a product. A stage is filled again once the product after that is done too: then nobody waits long for the
  // slowest warpgroup.
  __device__ void finish(Ring& ring) const {
    if (streams_) {
      __syncwarp();
      if (threadIdx.x % 32 == 0) barrier_arrive(ring.empty[ring.stage]);
      if (ring.step > 0 && ring.step - 1 + Traits::kStages < steps_) {
        if (brings(ring, ring.unit)) {
          const int stage = ring.stage == 0 ? Traits::kStages - 1 : ring.stage - 1;
          barrier_wait(ring.empty[stage], (ring.step - 1) / Traits::kStages % 2);
          load(ring, ring.unit, stage);
        }
        if (++ring.unit == units_) ring.unit = 0;
      }
      ++ring.step;
    }
    if (++ring.stage == min(units_, Traits::kStages)) ring.stage = 0, ring.phase ^= streams_;
  }

  __device__ void run_tile(int32_t first_row, float threshold) {
    RowState state{{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
    Sums out;
#pragma unroll
    for (float& x : out) x = 0.0f;
    const int32_t row = first_row + threadIdx.x % 128 / 32 * 16;
    query_ = shared_address(s_.query[index_][first_row / Traits::kRows % 2]);
    wait(s_.query_full[index_][first_row / Traits::kRows % 2], first_row / Traits::kRows / 2 % 2);
    if (units_ > 0) attend(state, out);
#pragma unroll
    for (int h = 0; h < 2; ++h) normalize(row + threadIdx.x % 32 / 4 + 8 * h, h, threshold, state, out);
    const Rows& rows = a_.params.out;
    store_rows<Element, Traits::kWidth>(out, rows.element_size != sizeof(Element), static_cast<int>(rows.width) / 8,
                                        query_ + threadIdx.x % 128 / 32 * 16 * 128, Traits::kTileRows * 128,
                                        [&](int i) -> char* {
                                          if (row + i >= work_.rows) return nullptr;
                                          const Place place = find(row + i);
                                          return rows.row(work_.batch, place.query, place.head);
                                        });
  }

  // Unit by unit: while the weights of one are made, the tensor cores multiply the weights before with their values.
  __device__ void attend(RowState& state, Sums& out) {
    float logits[32], decay[2];
    uint32_t weights[4][4];
    wait(s_.key_full[keys_.stage], keys_.phase);
    // Accumulators are not to be touched between the fence and the wait: the compiler would wait for each product.
    mma_pin(logits);
    mma_fence();
    multiply_keys(logits);
    mma_commit();
    mma_wait<0>();
    mma_pin(logits);
    finish(keys_);
    weigh(s_.bias, logits, state, decay);
    pack_weights<Element>(logits, weights);
    for (int32_t unit = 1; unit < units_; ++unit) {
      wait(s_.key_full[keys_.stage], keys_.phase);
      wait(s_.value_full[values_.stage], values_.phase);
      mma_pin(logits);
      mma_pin(out);
      mma_fence();
      multiply_keys(logits);
      mma_commit();
      multiply_values(weights, out);
      mma_commit();
      mma_wait<1>();  // the logits
      mma_pin(logits);
      finish(keys_);
      const bool rescale = weigh(s_.bias + unit * Traits::kSlots, logits, state, decay);
      mma_wait<0>();
      mma_pin(out);
      finish(values_);
      if (rescale) {
#pragma unroll
        for (int i = 0; i < Traits::kWidth / 2; ++i) out[i] *= decay[i / 2 % 2];
      }
      pack_weights<Element>(logits, weights);
    }
    wait(s_.value_full[values_.stage], values_.phase);
    mma_pin(out);
    mma_fence();
    multiply_values(weights, out);
    mma_commit();
    mma_wait<0>();
    mma_pin(out);
    finish(values_);
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
  __device__ void multiply_keys(float (&logits)[32]) const {
    const uint64_t query = matrix_descriptor(query_, 16);
    const uint64_t key = matrix_descriptor(shared_address(s_.key[keys_.stage]), 16);
#pragma unroll
    for (int k = 0; k < Traits::kWidth / 16; ++k)
      multiply_shared<Element>(logits, advance(query, k / 4 * Traits::kTileRows * 128 + k % 4 * 32),
                               advance(key, k / 4 * Traits::kSlots * 128 + k % 4 * 32), k > 0);
  }

  // out += weights values, asynchronously.
  __device__ void multiply_values(const uint32_t (&weights)[4][4], Sums& out) const {
    const uint64_t value = matrix_descriptor(shared_address(s_.value[values_.stage]), Traits::kSlots * 128);
#pragma unroll
    for (int k = 0; k < 4; ++k) multiply_registers<Element>(out, weights[k], advance(value, k * 16 * 128));
  }

  // Divides by the sum, and stores the LSE.
  __device__ void normalize(int32_t row, int h, float threshold, const RowState& state, Sums& out) const {
    const ForwardParams<float>& p = a_.params;
    const float sum = reduce_sum(state.sum[h]);
    const bool is_nan = threshold != threshold || sum != sum;
    const float factor = is_nan ? NAN : sum == 0.0f ? 0.0f : __fdividef(1.0f, sum);
    if (threadIdx.x % 4 == 0 && row < work_.rows) {
      const Place place = find(row);
      p.lse[(work_.batch * p.groups * p.heads_per_group + place.head) * p.queries + place.query] =
          is_nan        ? NAN
          : sum == 0.0f ? -INFINITY
                        : (state.reference[h] + log2f(sum)) * kLn2;
    }
#pragma unroll
    for (int i = 0; i < Traits::kWidth / 2; ++i)
      if (i / 2 % 2 == h) out[i] *= factor;
  }

  __device__ static void wait(uint64_t& barrier, uint32_t phase) {
    barrier_wait(barrier, phase);
    fence_async_proxy();
  }
  static constexpr int kCopied = Traits::kSlots / 4;  // rows of a unit that a warp copies
  static constexpr float kLn2 = 0.6931471805599453f;

  const ShortForwardArguments& a_;
  const ShortWork& work_;
  Shared& s_;
  const int index_;
  uint32_t query_;         // address of the tile's
  int32_t units_, steps_;  // of a tile, and of all tiles
  bool streams_;           // units do not all fit, and are brought again for each tile
  Ring keys_, values_;
};

}  // namespace sparsek::cuda::sm90
