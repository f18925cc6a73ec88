// A consumer: a warpgroup that attends with 64 rows of a job at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>

#include "cuda/sm90/accumulators.cuh"
#include "cuda/sm90/ptx.cuh"
#include "cuda/sm90/short_forward/traits.cuh"
#include "cuda/sm90/wgmma.cuh"

namespace sparsek::cuda::sm90 {

// Softmax weights may exceed 1 by so many powers of 2, so that earlier sums are seldom scaled.
constexpr float kLeeway = 8.0f;

template <typename Traits>
class ShortConsumer {
 public:
  using Element = typename Traits::Element;
  using Shared = typename Traits::Shared;
  using Sums = float[Traits::kWidth / 2];

  __device__ ShortConsumer(const ShortForwardArguments& a, Shared& shared)
      : a_(a),
        s_(shared),
        index_(__shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128 - 1, 0)),
        queries_(matrix_descriptor(shared_address(shared.query[index_]), 16)),
        keys_(matrix_descriptor(shared_address(shared.key), 16)),
        values_(matrix_descriptor(shared_address(shared.value), Traits::kSlots * 128)) {}

  __device__ void run() {
    Ring<2> job;
    for (int64_t index = blockIdx.x; index < a_.jobs; index += gridDim.x, job.advance()) {
      barrier_wait(s_.job_full[job.place], job.phase);
      run_job(s_.jobs[job.place]);
      barrier_arrive_as_warp(s_.job_empty[job.place], threadIdx.x % 32);
    }
    if (threadIdx.x % 32 == 0) bulk_wait_read();  // shared memory ends with the CTA
  }

 private:
  using Job = typename Traits::Job;
  struct RowState {
    float reference[2];  // what logits are taken relative to: their maximum so far, or less by up to kLeeway
    float sum[2];        // this thread's part
  };

  __device__ void run_job(const Job& job) {
    const int32_t rows = job.rows;
    units_ = job.units;
    const bool stay = units_ <= Traits::kStages;  // else they come again for each tile
    const auto begin = unit_;
    for (int32_t row = index_ * Traits::kTileRows, left = rows; left > 0; row += Traits::kRows, left -= Traits::kRows) {
      fresh_ = !stay || left == rows;
      done_ = !stay || left <= Traits::kRows;
      if (stay) unit_ = begin;
      barrier_wait(s_.query_full[index_][tile_.place], tile_.phase);
      if (row < rows) {
        run_tile(job, row);
      } else {
        pass_over();
      }
      tile_.advance();
      leaves_ = true;
    }
  }

  // Frees the queries of the tile before, once the output in their place has left.
  __device__ void release_queries() const {
    if (leaves_ && threadIdx.x % 32 == 0) {
      bulk_wait_read();
      barrier_arrive(s_.query_empty[index_][tile_.place ^ 1]);
    }
  }

  // For a tile without rows.
  __device__ void pass_over() {
    release_queries();
    for (int32_t unit = 0; unit < units_; ++unit, unit_.advance()) {
      if (fresh_) barrier_wait(s_.full[unit_.place], unit_.phase);
      if (done_) barrier_arrive_as_warp(s_.empty[unit_.place], threadIdx.x % 32);
    }
  }

  __device__ void run_tile(const Job& job, int32_t row) {
    RowState state{{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
    Sums out;
#pragma unroll
    for (float& x : out) x = 0.0f;
    if (units_ > 0) {
      attend(state, out);
    } else {
      release_queries();
    }
    row += threadIdx.x % 128 / 32 * 16;
#pragma unroll
    for (int h = 0; h < 2; ++h) normalize(job, row + threadIdx.x % 32 / 4 + 8 * h, h, state, out);
    store(job, row, out);
  }

  __device__ void store(const Job& job, int32_t row, const Sums& out) const {
    const Rows& rows = a_.params.out;
    if (rows.element_size != sizeof(Element)) {
      store_floats<Traits::kWidth>(out, static_cast<int>(rows.width) / 8, [&](int i) -> char* {
        const int32_t r = row + i, head = r & ((1 << a_.log_heads) - 1);
        return r < job.rows ? rows.row(job.batch, job.query + (r >> a_.log_heads), job.head + head) : nullptr;
      });
      return;
    }
    const uint32_t place = shared_address(s_.query[index_][tile_.place]) + threadIdx.x % 128 / 32 * (16 * 128);
    constexpr uint32_t kColumn = Traits::kTileRows * 128;
    stage_rows<Element, Traits::kWidth>(out, {place, kColumn});
    fence_async_proxy();
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      for (int column = 0; column < rows.width; column += 64)
        store_tile(&a_.out, column, job.head, job.query + (row >> a_.log_heads), job.batch,
                   place + column / 64 * kColumn);
      bulk_commit();
    }
  }

  // Unit by unit: while the weights of one are made, the tensor cores multiply the weights before with their values.
  __device__ void attend(RowState& state, Sums& out) {
    float logits[32], decay[2];
    uint32_t weights[4][4];
    float4 bias[4];
    wait_unit();
    // Accumulators are not to be touched between the fence and the wait: the compiler would wait for each product.
    mma_pin(logits);
    mma_fence();
    multiply_keys(logits);
    mma_commit();
    load_bias(bias);
    release_queries();
    mma_wait<0>();
    mma_pin(logits);
    weigh(bias, logits, state, decay);
    pack_weights<Element>(logits, weights);
    for (int32_t unit = 1; unit < units_; ++unit) {
      const int before = unit_.place;
      unit_.advance();
      wait_unit();
      mma_pin(logits);
      mma_pin(out);
      mma_fence();
      multiply_keys(logits);
      mma_commit();
      multiply_values(weights, before, out);
      mma_commit();
      load_bias(bias);
      mma_wait<1>();  // the logits
      mma_pin(logits);
      const bool rescale = weigh(bias, logits, state, decay);
      mma_wait<0>();
      mma_pin(out);
      mma_pin(weights);
      if (done_) barrier_arrive_as_warp(s_.empty[before], threadIdx.x % 32);
      if (rescale) {
#pragma unroll
        for (int i = 0; i < Traits::kWidth / 2; ++i) out[i] *= decay[i / 2 % 2];
      }
      pack_weights<Element>(logits, weights);
    }
    mma_pin(out);
    mma_fence();
    multiply_values(weights, unit_.place, out);
    mma_commit();
    mma_wait<0>();
    mma_pin(out);
    if (done_) barrier_arrive_as_warp(s_.empty[unit_.place], threadIdx.x % 32);
    unit_.advance();
  }

  __device__ void wait_unit() const {
    if (!fresh_) return;
    barrier_wait(s_.full[unit_.place], unit_.phase);
    fence_async_proxy();
  }

  // Of this thread's columns.
  __device__ void load_bias(float4 (&bias)[4]) const {
    const float4* const from = reinterpret_cast<const float4*>(s_.bias[unit_.place].column[threadIdx.x % 4]);
#pragma unroll
    for (int j = 0; j < 4; ++j) bias[j] = from[j];
  }

  // Turns logits into weights. Returns whether earlier sums are to be scaled, by `decay`.
  __device__ bool weigh(const float4 (&bias)[4], float (&logits)[32], RowState& state, float (&decay)[2]) const {
    // Where all gates are 1, logits are scaled together with the subtraction; a factor below 0 would turn the maximum.
    const bool* const halves = s_.bias[unit_.place].solid;
    const bool solid = halves[0] && halves[1] && a_.factor > 0.0f;
    if (!solid) {
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        const float4& pair = bias[i / 8];  // of pairs of columns
        const float of_column = i / 4 % 2 == 0 ? (i % 2 == 0 ? pair.x : pair.y) : (i % 2 == 0 ? pair.z : pair.w);
        logits[i] = fmaf(logits[i], a_.factor, of_column);
      }
    }
    float chains[4];  // two a row, since each maximum is a chain
#pragma unroll
    for (int i = 0; i < 32; ++i) chains[i % 4] = i < 4 ? logits[i] : fmaxf(chains[i % 4], logits[i]);
    const float factor = solid ? a_.factor : 1.0f;
    float highest[2] = {fmaxf(chains[0], chains[1]) * factor, fmaxf(chains[2], chains[3]) * factor};
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
      logits[i] = exp2_fast(fmaf(logits[i], factor, -shift[i / 2 % 2]));
      state.sum[i / 2 % 2] += logits[i];
    }
    return rescale;
  }

  // logits = queries keys^T, asynchronously.
  __device__ void multiply_keys(float (&logits)[32]) const {
    const uint64_t left = advance_low(queries_, tile_.place * sizeof(s_.query[0][0]));
    const uint64_t right = advance_low(keys_, unit_.place * sizeof(s_.key[0]));
#pragma unroll
    for (int k = 0; k < Traits::kWidth / 16; ++k)
      multiply_shared<Element>(logits, advance_low(left, k / 4 * Traits::kTileRows * 128 + k % 4 * 32),
                               advance_low(right, k / 4 * Traits::kSlots * 128 + k % 4 * 32), k > 0);
  }

  // out += weights values, asynchronously.
  __device__ void multiply_values(const uint32_t (&weights)[4][4], int stage, Sums& out) const {
    const uint64_t right = advance_low(values_, stage * sizeof(s_.value[0]));
#pragma unroll
    for (int k = 0; k < 4; ++k) multiply_registers<Element>(out, weights[k], advance_low(right, k * 16 * 128));
  }

  // Divides by the sum, and stores the LSE.
  __device__ void normalize(const Job& job, int32_t row, int h, const RowState& state, Sums& out) const {
    const float sum = reduce_sum(state.sum[h]);
    const bool is_nan = job.threshold != job.threshold || sum != sum;
    const float factor = is_nan ? NAN : sum == 0.0f ? 0.0f : __fdividef(1.0f, sum);
    if (threadIdx.x % 4 == 0 && row < job.rows) {
      const uint32_t head = row & ((1 << a_.log_heads) - 1), query = row >> a_.log_heads;
      job.lse[head * a_.params.queries + query] = is_nan        ? NAN
                                                  : sum == 0.0f ? -INFINITY
                                                                : (state.reference[h] + __log2f(sum)) * kLn2;
    }
#pragma unroll
    for (int i = 0; i < Traits::kWidth / 2; ++i)
      if (i / 2 % 2 == h) out[i] *= factor;
  }

  const ShortForwardArguments& a_;
  Shared& s_;
  const int index_;
  const uint64_t queries_, keys_, values_;  // matrix descriptors of the first stages
  int32_t units_;                           // of the job
  bool leaves_ = false;                     // the output of the tile before
  bool fresh_;                              // units are to be waited for
  bool done_;                               // units are not needed any longer
  Ring<Traits::kStages> unit_;
  Ring<Traits::kQueryStages> tile_;
};

}  // namespace sparsek::cuda::sm90
