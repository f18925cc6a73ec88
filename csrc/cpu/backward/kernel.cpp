// Backward: recomputes the weights of one tile of queries after the other, block by block. A segment's gradients of
// keys, values and scores are summed in memory of its own and added to the result in the order of the segments, so that
// gradients do not depend on the threads.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <utility>

#include "cpu/backward/params.h"
#include "cpu/backward/softmax.h"
#include "cpu/common/tasks.h"
#include "cpu/selection/tile.h"

namespace sparsek::cpu {
namespace {

template <typename T>
class BackwardWorker {
 public:
  BackwardWorker(const BackwardParams<T>& params, int64_t tile)
      : p_(params),
        tile_(tile),
        max_rows_(tile * params.heads_per_group),
        key_(params.key),
        value_(params.value),
        query_(max_rows_ * params.query.width),
        grad_out_(max_rows_ * params.value.width),
        grad_query_(max_rows_ * params.query.width),
        logits_(max_rows_ * kKeyBlock),
        grad_weights_(max_rows_ * kKeyBlock),
        block_sums_(kKeyBlock * (std::max(params.query.width, params.value.width) + 1)),
        state_(max_rows_) {}

  void run(const Segment& segment, Turns& turns) {
    const Sequence& sequence = p_.sequences[segment.sequence];
    const int64_t slots = segment.num_slots();
    reset(segment_key_, slots * p_.query.width);
    reset(segment_value_, slots * p_.value.width);
    reset(segment_score_, slots);
    for_each_tile(segment, sequence, tile_, p_.heads_per_group,
                  [&](const TileRows& tile) { run_tile(segment, sequence, tile); });
    turns.in_order(segment.stream, segment.index, [&] { add_segment(segment, sequence); });
  }

 private:
  void run_tile(const Segment& segment, const Sequence& sequence, const TileRows& tile) {
    const int64_t head = sequence.batch * p_.groups + segment.group;
    const int64_t keys = head * p_.keys + sequence.key_begin;
    const int64_t first_query = head * p_.queries + tile.query;
    columns_.fill(segment, p_.pattern, p_.expiry + keys, p_.scores + keys, tile);

    const int64_t rows = tile.count();
    const Matrix<T> query{query_.data(), rows, p_.query.width, p_.query.width};
    const Matrix<T> grad_out{grad_out_.data(), rows, p_.value.width, p_.value.width};
    const Matrix<T> grad_query{grad_query_.data(), rows, p_.query.width, p_.query.width};
    tile.for_each([&](int64_t r, int64_t row, int64_t h) {
      load_row(p_.query, p_.query.row(sequence.batch, row, h), T(p_.scale), query.data + r * query.row_stride);
      std::fill_n(grad_query.data + r * grad_query.row_stride, grad_query.cols, T(0));
      load_state(r, sequence, row, h, tile.position(r), p_.threshold[head * p_.queries + row], grad_out);
    });

    for (int64_t c = 0; c < columns_.count(); c += kKeyBlock) {
      const int64_t count = std::min(kKeyBlock, columns_.count() - c);
      const Columns<T> columns = columns_.from(c);
      const auto key_of = [&](int64_t i) { return sequence.key_begin + segment.key(columns_.slot(c + i)); };
      const auto sees = [&](int64_t r, int64_t i) { return columns.sees(i, state_[r].position); };
      key_.gather(sequence.batch, segment.group, count, key_of);
      value_.gather(sequence.batch, segment.group, count, key_of);

      const Matrix<T> weights{logits_.data(), rows, count, kKeyBlock};
      const Matrix<T> grad_logits{grad_weights_.data(), rows, count, kKeyBlock};
      multiply(weights, query, key_.matrix().transposed(), false);
      key_.set_products(weights, query, sees);
      multiply(grad_logits, grad_out, value_.matrix().transposed(), false);
      value_.set_products(grad_logits, grad_out, sees);
      differentiate_block(columns, c, count, tile.positions, p_.query_sums + first_query, weights, grad_logits);

      multiply(grad_query, grad_logits, key_.matrix(), true);
      key_.add_products(grad_query, grad_logits, sees);
      add_block(grad_logits, query, c, segment_key_.data());
      add_block(weights, grad_out, c, segment_value_.data());
    }

    tile.for_each([&](int64_t r, int64_t row, int64_t h) {
      store_row(p_.grad_query, p_.grad_query.row(sequence.batch, row, h), T(p_.scale),
                grad_query.data + r * grad_query.row_stride);
    });
  }

  // Reads grad_out and what else row r needs beside the logits.
  void load_state(int64_t r, const Sequence& sequence, int64_t row, int64_t h, int32_t position, T threshold,
                  const Matrix<T>& grad_out) {
    T* gradient = grad_out.data + r * grad_out.row_stride;
    T* out = block_sums_.data();
    load_row(p_.grad_out, p_.grad_out.row(sequence.batch, row, h), T(1), gradient);
    load_row(p_.out, p_.out.row(sequence.batch, row, h), T(1), out);
    T delta = 0;
    for (int64_t d = 0; d < grad_out.cols; ++d) delta += gradient[d] * out[d];
    const int64_t i = p_.flat_query(sequence.batch, h, row);
    if (p_.grad_lse != nullptr) delta -= p_.grad_lse[i];
    state_[r] = {position, threshold, p_.lse[i], delta};
  }

  // query_sums [positions]: the heads of a group share their gates.
  void differentiate_block(const Columns<T>& columns, int64_t begin, int64_t count, int64_t positions,
                           double* query_sums, const Matrix<T>& weights, const Matrix<T>& grad_logits) {
    T* key_sums = block_sums_.data();
    std::fill_n(key_sums, count, T(0));
    for (int64_t r = 0; r < weights.rows; ++r)
      query_sums[r % positions] +=
          differentiate(weights.data + r * weights.row_stride, grad_logits.data + r * grad_logits.row_stride, columns,
                        count, state_[r], p_.pattern.hard, key_sums);
    for (int64_t c = 0; c < count; ++c) segment_score_[columns_.slot(begin + c)] += key_sums[c];
  }

  // sums[slot of column c, :] += (a^T b)[c, :]
  void add_block(const Matrix<T>& a, const Matrix<T>& b, int64_t begin, T* sums) {
    const Matrix<T> block{block_sums_.data(), a.cols, b.cols, b.cols};
    multiply(block, a.transposed(), b, false);
    for (int64_t c = 0; c < block.rows; ++c) {
      T* __restrict sum = sums + columns_.slot(begin + c) * b.cols;
      const T* __restrict part = block.data + c * b.cols;
      for (int64_t d = 0; d < b.cols; ++d) sum[d] += part[d];
    }
  }

  void add_segment(const Segment& segment, const Sequence& sequence) {
    const int64_t head = sequence.batch * p_.groups + segment.group;
    for (int32_t slot = 0; slot < segment.num_slots(); ++slot) {
      const int64_t key = sequence.key_begin + segment.key(slot);
      const int64_t row = (sequence.batch * p_.keys + key) * p_.groups + segment.group;
      add(p_.grad_key + row * p_.query.width, segment_key_.data() + slot * p_.query.width, p_.query.width);
      add(p_.grad_value + row * p_.value.width, segment_value_.data() + slot * p_.value.width, p_.value.width);
      p_.key_sums[head * p_.keys + key] += segment_score_[slot];
    }
  }

  static void add(T* __restrict sum, const T* __restrict part, int64_t width) {
    for (int64_t d = 0; d < width; ++d) sum[d] += part[d];
  }

  template <typename U>
  static void reset(Buffer<U>& buffer, int64_t size) {
    buffer.reserve(size);
    std::fill_n(buffer.data(), size, U(0));
  }

  const BackwardParams<T>& p_;
  const int64_t tile_;
  const int64_t max_rows_;
  TileColumns<T> columns_;
  GatheredRows<T> key_;
  GatheredRows<T> value_;
  Buffer<T> query_;               // [rows, K], scaled
  Buffer<T> grad_out_;            // [rows, Kv]
  Buffer<T> grad_query_;          // [rows, K]
  Buffer<T> logits_;              // [rows, kKeyBlock]
  Buffer<T> grad_weights_;        // [rows, kKeyBlock]
  Buffer<T> block_sums_;          // [kKeyBlock, K or Kv]
  Buffer<RowState<T>> state_;     // [rows]
  Buffer<T> segment_key_;         // [slots, K]
  Buffer<T> segment_value_;       // [slots, Kv]
  Buffer<double> segment_score_;  // [slots]
};

}  // namespace

template <typename T>
void run_backward(const BackwardParams<T>& params) {
  const Plan plan =
      make_plan(params.sequences, params.pattern, params.groups, params.heads_per_group, params.expiry, params.keys);
  Turns turns(plan.streams);
  run_tasks(
      static_cast<int64_t>(plan.segments.size()),
      [&] {
        auto worker = std::make_unique<BackwardWorker<T>>(params, plan.tile);
        return [&plan, &turns, worker = std::move(worker)](int64_t i) { worker->run(plan.segments[i], turns); };
      },
      &turns);
}

template void run_backward(const BackwardParams<float>&);
template void run_backward(const BackwardParams<double>&);

}  // namespace sparsek::cpu
