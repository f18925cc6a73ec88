// Forward: attention of one tile of queries after the other over the keys that it sees, block by block.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <utility>

#include "cpu/common/tasks.h"
#include "cpu/forward/params.h"
#include "cpu/forward/softmax.h"
#include "cpu/selection/tile.h"

namespace sparsek::cpu {
namespace {

template <typename T>
class ForwardWorker {
 public:
  ForwardWorker(const ForwardParams<T>& params, int64_t tile)
      : p_(params),
        tile_(tile),
        max_rows_(tile * params.heads_per_group),
        key_(params.key),
        value_(params.value),
        query_(max_rows_ * params.query.width),
        logits_(max_rows_ * kKeyBlock),
        out_(max_rows_ * params.value.width),
        maximum_(max_rows_),
        sum_(max_rows_) {}

  void run(const Segment& segment) {
    const Sequence& sequence = p_.sequences[segment.sequence];
    for_each_tile(segment, sequence, tile_, p_.heads_per_group,
                  [&](const TileRows& tile) { run_tile(segment, sequence, tile); });
  }

 private:
  void run_tile(const Segment& segment, const Sequence& sequence, const TileRows& tile) {
    const int64_t head = sequence.batch * p_.groups + segment.group;
    const int64_t keys = head * p_.keys + sequence.key_begin;
    const T* threshold = p_.threshold + head * p_.queries + tile.query;
    columns_.fill(segment, p_.pattern, p_.expiry + keys, p_.scores + keys, tile);

    const int64_t rows = tile.count();
    const Matrix<T> query{query_.data(), rows, p_.query.width, p_.query.width};
    const Matrix<T> out{out_.data(), rows, p_.value.width, p_.value.width};
    tile.for_each([&](int64_t r, int64_t row, int64_t h) {
      load_row(p_.query, p_.query.row(sequence.batch, row, h), T(p_.scale), query.data + r * query.row_stride);
      std::fill_n(out.data + r * out.row_stride, out.cols, T(0));
      maximum_[r] = -std::numeric_limits<T>::infinity();
      sum_[r] = 0;
    });

    for (int64_t c = 0; c < columns_.count(); c += kKeyBlock) {
      const int64_t count = std::min(kKeyBlock, columns_.count() - c);
      const Columns<T> columns = columns_.from(c);
      const auto key_of = [&](int64_t i) { return sequence.key_begin + segment.key(columns_.slot(c + i)); };
      const auto sees = [&](int64_t r, int64_t i) { return columns.sees(i, tile.position(r)); };
      key_.gather(sequence.batch, segment.group, count, key_of);
      value_.gather(sequence.batch, segment.group, count, key_of);

      const Matrix<T> logits{logits_.data(), rows, count, kKeyBlock};
      multiply(logits, query, key_.matrix().transposed(), false);
      key_.set_products(logits, query, sees);
      for (int64_t r = 0; r < rows; ++r)
        accumulate_row(r, columns, count, tile.position(r), threshold[r % tile.positions], logits, out);
      multiply(out, logits, value_.matrix(), true);
      value_.add_products(out, logits, sees);
    }

    tile.for_each([&](int64_t r, int64_t row, int64_t h) {
      const T factor = sum_[r] == T(0) ? T(0) : T(1) / sum_[r];  // no key: output 0, LSE -inf
      store_row(p_.out, p_.out.row(sequence.batch, row, h), factor, out.data + r * out.row_stride);
      p_.lse[p_.flat_query(sequence.batch, h, row)] = maximum_[r] + std::log(sum_[r]);
    });
  }

  // Online softmax: turns logits into weights relative to the maximum so far, and scales what was summed before.
  void accumulate_row(int64_t r, const Columns<T>& columns, int64_t count, int32_t position, T threshold,
                      const Matrix<T>& logits, const Matrix<T>& out) {
    T* row = logits.data + r * logits.row_stride;
    const T before = maximum_[r];
    const T maximum = std::max(before, seen_max(row, columns, count, position));
    const T sum = weigh(row, columns, count, position, threshold, p_.pattern.hard, maximum);
    if (maximum != before) {
      const T decay = std::exp(before - maximum);
      for (int64_t d = 0; d < out.cols; ++d) out.data[r * out.row_stride + d] *= decay;
      sum_[r] *= decay;
      maximum_[r] = maximum;
    }
    sum_[r] += sum;
  }

  const ForwardParams<T>& p_;
  const int64_t tile_;
  const int64_t max_rows_;
  TileColumns<T> columns_;
  GatheredRows<T> key_;
  GatheredRows<T> value_;
  Buffer<T> query_;    // [rows, K], scaled
  Buffer<T> logits_;   // [rows, kKeyBlock]
  Buffer<T> out_;      // [rows, Kv], not yet divided by the sum
  Buffer<T> maximum_;  // [rows]
  Buffer<T> sum_;      // [rows]
};

}  // namespace

template <typename T>
void run_forward(const ForwardParams<T>& params) {
  const Plan plan =
      make_plan(params.sequences, params.pattern, params.groups, params.heads_per_group, params.expiry, params.keys);
  run_tasks(static_cast<int64_t>(plan.segments.size()), [&] {
    auto worker = std::make_unique<ForwardWorker<T>>(params, plan.tile);
    return [&plan, worker = std::move(worker)](int64_t i) { worker->run(plan.segments[i]); };
  });
}

template void run_forward(const ForwardParams<float>&);
template void run_forward(const ForwardParams<double>&);

}  // namespace sparsek::cpu
