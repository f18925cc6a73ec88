// A consumer: a warpgroup that goes with 64 keys of each unit through the tiles of queries that may see them, with keys
// as the rows of its products: so are weights and gradients of logits already left factors. The gradients of queries
// need the keys of both consumers: each gives its part to shared memory and takes a half of the product.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/sm90/backward/differentiate.cuh"
#include "cuda/sm90/backward/traits.cuh"
#include "cuda/sm90/launch.h"
#include "cuda/sm90/ptx.cuh"
#include "cuda/sm90/wgmma.cuh"

namespace sparsek::cuda::sm90 {

template <typename Traits>
class Consumer {
 public:
  using Element = typename Traits::Element;
  using Shared = typename Traits::Shared;
  static constexpr int kRows = Traits::kRows, kWidth = Traits::kWidth;

  __device__ Consumer(const BackwardArguments& a, Shared& shared)
      : a_(a),
        s_(shared),
        index_(__shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0) - 1),
        warp_(static_cast<int>(threadIdx.x) % 128 / 32),
        lane_(static_cast<int>(threadIdx.x) % 32),
        scale_(static_cast<float>(a.params.scale) * static_cast<float>(kLog2e)) {}

  __device__ void run() {
    Ring<Traits::kUnits> units;
    Ring<1> keys;
    while (true) {
      barrier_wait(s_.unit_full[units.place], units.phase);
      const Unit& unit = s_.units[units.place];
      if (!unit.done) {
        barrier_wait(s_.key_full, keys.phase);
        barrier_wait(s_.value_full, keys.phase);
      }
      announce();
      if (unit.done) return;
      run_unit(unit);
      barrier_arrive_as_warp(s_.unit_empty[units.place], lane_);
      units.advance();
      keys.advance();
    }
  }

 private:
  static constexpr int kSteps = kRows / 16;
  using Factor = uint32_t[kSteps][4];
  using QuerySums = float[kRows / 32];

  __device__ void run_unit(const Unit& unit) {
    float grad_key[kWidth / 2], grad_value[kWidth / 2], key_sums[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) grad_key[i] = grad_value[i] = 0.0f;
    KeyState keys;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int slot = own_slot(h);
      keys.score[h] = unit.score[slot];
      keys.soft_score[h] = unit.soft_score[slot];
      keys.from[h] = unit.from[slot];
    }
    const int32_t heads = static_cast<int32_t>(a_.params.heads_per_group);
    for_each_tile_of(unit, heads,
                     [&](int32_t, int32_t tile) { run_tile(unit, tile, keys, key_sums, grad_key, grad_value); });
    barrier_arrive_as_warp(s_.keys_empty, lane_);
    add(unit, grad_key, grad_value, key_sums);
  }

  __device__ void run_tile(const Unit& unit, int32_t tile, const KeyState& keys, float (&key_sums)[2],
                           float (&grad_key)[kWidth / 2], float (&grad_value)[kWidth / 2]) {
    const int query = query_.place, grad = grad_.place;
    float logits[kRows / 2], grads[kRows / 2];
    // Barriers and shared memory answer only after the products that were issued before: they are asked first.
    barrier_wait(s_.query_full[query], query_.phase);
    barrier_wait(s_.grad_full[grad], grad_.phase);
    float2 lse[kReadAhead];
    read_lse(s_.rows[grad], lse);
    multiply_rows(logits, shared_address(s_.key), shared_address(s_.query[query]));
    multiply_rows(grads, shared_address(s_.value), shared_address(s_.grad[grad]));
    mma_wait<1>();
    mma_pin(logits);
    exponentiate<kRows>(logits, s_.rows[grad], lse, scale_);
    mma_pin(logits);  // now, under the other product
    mma_wait<0>();
    mma_pin(grads);
    QuerySums query_sums;
    Factor weight_factor, grad_factor;
    differentiate_tile(unit, tile, keys, logits, grads, key_sums, query_sums, weight_factor, grad_factor);
    share_factor(weight_factor, grad_factor);

    float grad_query[32];
    const bool may_give = barrier_test(s_.sums_empty, sums_phase_ ^ 1);
    multiply_factor(weight_factor, Traits::kCareful ? clean_grad() : shared_address(s_.grad[grad]), grad_value);
    named_barrier_sync(kConsumerBarrier, 256);
    multiply_keys(grad_query);
    multiply_factor(grad_factor, Traits::kCareful ? clean_query() : shared_address(s_.query[query]), grad_key);
    mma_wait<2>();
    mma_pin(grad_value);
    barrier_arrive_as_warp(s_.grad_empty[grad], lane_);
    mma_wait<1>();
    mma_pin(grad_query);
    if (!may_give) barrier_wait(s_.sums_empty, sums_phase_ ^ 1);
    give(grad_query, query_sums);
    mma_wait<0>();
    mma_pin(grad_key);
    barrier_arrive_as_warp(s_.query_empty[query], lane_);
    query_.advance();
    grad_.advance();
    if (++factor_ == Traits::kFactors) factor_ = 0;
    if (Traits::kFactors == 1) named_barrier_sync(kConsumerBarrier, 256);
  }

  // product = left right^T, of this consumer's keys and all queries of the tile.
  __device__ void multiply_rows(float (&product)[kRows / 2], uint32_t left, uint32_t right) const {
    const uint64_t a = matrix_descriptor(left + index_ * 64 * 128, 16), b = matrix_descriptor(right, 16);
    mma_fence();
    begin_shared<Element>(product, a, b);
#pragma unroll
    for (int k = 1; k < kWidth / 16; ++k)
      multiply_shared<Element>(product, advance(a, k / 4 * kKeys * 128 + k % 4 * 32),
                               advance(b, k / 4 * kRows * 128 + k % 4 * 32), true);
    mma_commit();
  }

  // sums += factor right.
  __device__ void multiply_factor(const Factor& factor, uint32_t right, float (&sums)[kWidth / 2]) const {
    const uint64_t b = matrix_descriptor(right, kRows * 128);
    mma_pin(sums);
    mma_fence();
#pragma unroll
    for (int k = 0; k < kSteps; ++k) multiply_registers<Element>(sums, factor[k], advance(b, k * 16 * 128));
    mma_commit();
  }

  // Where there are 128 queries, each consumer takes 64 of them, else 64 columns.
  __device__ void multiply_keys(float (&grad_query)[32]) const {
    const uint32_t column = index_ * (kKeys * 128);
    uint32_t keys = shared_address(s_.key), left = shared_address(s_.factor[factor_]);
    if constexpr (Traits::kCareful) keys = shared_address(s_.clean_key);
    (kWidth == 128 ? keys : left) += column;
    const uint64_t a = matrix_descriptor(left, kKeys * 128), b = matrix_descriptor(keys, kKeys * 128);
    mma_pin(grad_query);
    mma_fence();
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k)
      multiply_columns<Element>(grad_query, advance(a, k * 16 * 128), advance(b, k * 16 * 128), k > 0);
    mma_commit();
  }

  __device__ void differentiate_tile(const Unit& unit, int32_t tile, const KeyState& keys,
                                     const float (&weights)[kRows / 2], const float (&grads)[kRows / 2],
                                     float (&key_sums)[2], QuerySums& query_sums, Factor& weight_factor,
                                     Factor& grad_factor) const {
    const TileRows<kRows>& rows = s_.rows[grad_.place];
    const int32_t first = tile * kRows, window = static_cast<int32_t>(a_.params.pattern.window);
    const auto run = [&](auto gates) {
      differentiate<Traits, decltype(gates)::value>(weights, grads, key_sums, query_sums, weight_factor, grad_factor,
                                                    rows, keys, first, window);
    };
    const bool entered = unit.all_entered <= first;
    const int32_t last = min(unit.end_query - first, kRows) - 1;
    if (unit.windows) {
      run(std::integral_constant<Gates, Gates::kWindow>{});
    } else if (a_.params.pattern.hard) {
      run(std::integral_constant<Gates, Gates::kHard>{});
    } else if (!entered) {
      run(std::integral_constant<Gates, Gates::kEntering>{});
    } else if (!Traits::kCareful && unit.open_score - rows.threshold[last] >= 1.0f) {
      run(std::integral_constant<Gates, Gates::kOpen>{});
    } else {
      run(std::integral_constant<Gates, Gates::kSoft>{});
    }
  }

  // Gives the gradients of logits to the other consumer too.
  __device__ void share_factor(Factor& weight_factor, Factor& grad_factor) const {
    const int row = index_ * 64 + warp_ * 16 + lane_ % 16;
    const uint32_t to = shared_address(s_.factor[factor_]) + row * 128;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      uint32_t shared[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        shared[i] = grad_factor[k][i];
        if constexpr (Traits::kCareful) {
          const int query = 16 * k + i / 2 * 8 + lane_ % 4 * 2;
          const uint8_t *bad_grad = &s_.bad_grad[query], *bad_query = &s_.bad_query[query];
          const bool bad_key = s_.bad_key[own_slot(i % 2)];
          weight_factor[k][i] = spoil(weight_factor[k][i], bad_grad[0], bad_grad[1]);
          shared[i] = spoil(shared[i], bad_key, bad_key);
          grad_factor[k][i] = spoil(grad_factor[k][i], bad_query[0], bad_query[1]);
        }
      }
      store_matrices(to + k / 4 * (kKeys * 128) + ((2 * k % 8 + lane_ / 16 ^ row % 8) << 4), shared);
    }
    fence_async_proxy();
  }

  // NaN for the elements of a pair that are not 0 and meet what is not finite.
  __device__ static uint32_t spoil(uint32_t pair, bool low, bool high) {
    if (low && (pair & 0x7fff) != 0) pair |= 0x7fff;
    if (high && (pair >> 16 & 0x7fff) != 0) pair |= 0x7fff0000;
    return pair;
  }

  __device__ uint32_t clean_query() const {
    if constexpr (Traits::kCareful) return shared_address(s_.clean_query);
    return 0;
  }
  __device__ uint32_t clean_grad() const {
    if constexpr (Traits::kCareful) return shared_address(s_.clean_grad);
    return 0;
  }

  // Gives the sums of a tile to the writer, as they lie.
  __device__ void give(const float (&grad_query)[32], const QuerySums& query_sums) {
    float4* to = reinterpret_cast<float4*>(s_.sums) + index_ * 8 * 128 + threadIdx.x % 128;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      to[i * 128] = {grad_query[4 * i], grad_query[4 * i + 1], grad_query[4 * i + 2], grad_query[4 * i + 3]};
    float* partial = s_.sums + kTileSums + (4 * index_ + warp_) * kRows + query_of_sums();
#pragma unroll
    for (int i = 0; i < kRows / 32; ++i) partial[32 * i] = query_sums[i];
    fence_async_proxy();
    barrier_arrive_as_warp(s_.sums_full, lane_);
    sums_phase_ ^= 1;
  }

  // Adds the sums of a unit to those of the runs after its own.
  __device__ void add(const Unit& unit, const float (&grad_key)[kWidth / 2], const float (&grad_value)[kWidth / 2],
                      const float (&key_sums)[2]) {
    const BackwardParams<float>& p = a_.params;
    int32_t* added = a_.added + unit.run * p.groups + unit.group;
    if (!unit.windows && unit.units_before > 0) {
      if (threadIdx.x == 128) {
        while (*static_cast<const volatile int32_t*>(added + p.groups) < unit.units_before) __nanosleep(100);
        __threadfence();
      }
      named_barrier_sync(kConsumerBarrier, 256);
    }
    float zero = 0.0f;  // NaN if any sum is not finite
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float sum = key_sums[h];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      const int slot = own_slot(h);
      const Mode mode = unit.mode[slot];
      if (mode == kSkip) continue;
      const int64_t key = unit.column + unit.key[slot];
      if (lane_ % 4 == 0) {
        if (mode == kAdd) {
          atomicAdd(p.key_sums + key, static_cast<double>(sum));
        } else {
          p.key_sums[key] = sum;
        }
      }
      add_row(a_.grad_key + key * p.query.width, p.query.width, h, mode, grad_key, zero);
      add_row(a_.grad_value + key * p.value.width, p.value.width, h, mode, grad_value, zero);
    }
    if (!Traits::kCareful && zero != 0.0f) {
      a_.suspects[unit.sequence.batch * p.groups + unit.group] = 1;
      a_.suspects[p.batch * p.groups] = 1;
    }
    if (!unit.windows) added_ = added;
  }

  // Makes the sums of the unit before visible to who waits for them; not right away, since stores take their time, but
  // before anything that other CTAs' progress decides.
  __device__ void announce() {
    if (added_ == nullptr) return;
    __threadfence();
    named_barrier_sync(kConsumerBarrier, 256);
    if (threadIdx.x == 128) atomicAdd(added_, 1);
    added_ = nullptr;
  }

  // One run at a time adds to a row: sums are the same bits every time.
  __device__ void add_row(float* to, int64_t width, int h, Mode mode, const float (&part)[kWidth / 2],
                          float& zero) const {
    float2* pairs = reinterpret_cast<float2*>(to) + lane_ % 4;
    const int count = static_cast<int>(width) / 8;
#pragma unroll
    for (int j = 0; j < kWidth / 8; ++j) {
      const float2 mine{part[4 * j + 2 * h], part[4 * j + 2 * h + 1]};
      zero = fmaf(mine.x, 0.0f, fmaf(mine.y, 0.0f, zero));
      if (j >= count) continue;
      if (mode == kAdd) {
        add_pair(pairs + 4 * j, mine);
      } else {
        __stcg(pairs + 4 * j, mine);
      }
    }
  }

  __device__ int own_slot(int h) const { return index_ * 64 + warp_ * 16 + lane_ / 4 + 8 * h; }

  const BackwardArguments& a_;
  Shared& s_;
  const int index_, warp_, lane_;
  const float scale_;
  Ring<Traits::kQueryStages> query_;
  Ring<Traits::kGradStages> grad_;
  int factor_ = 0;
  uint32_t sums_phase_ = 0;
  int32_t* added_ = nullptr;  // counts the unit before once its sums are visible
};

}  // namespace sparsek::cuda::sm90
