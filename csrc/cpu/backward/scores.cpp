// The gradient of the scores: the Jacobian of SparseK, I - 11^T / |F| on the fractional set F, applied to the gradient
// of the gates and summed over the queries. The second term is the same for all keys of F, and a key is in F for one
// interval of queries: its sum over them is a difference of two prefix sums.
#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/backward/params.h"
#include "cpu/common/tasks.h"

namespace sparsek::cpu {
namespace {

// Sums over any interval of terms. Terms that are not finite are counted instead of summed, so that they reach the
// intervals that hold them and no other.
class PrefixSums {
 public:
  explicit PrefixSums(int64_t size) : sums_(size + 1, 0.0), bad_(size + 1, 0) {}

  void append(int64_t i, double term) {
    const bool finite = std::isfinite(term);
    sums_[i + 1] = sums_[i] + (finite ? term : 0.0);
    bad_[i + 1] = bad_[i] + !finite;
  }

  double between(int64_t begin, int64_t end) const {
    return bad_[begin] == bad_[end] ? sums_[end] - sums_[begin] : std::nan("");
  }

 private:
  std::vector<double> sums_;
  std::vector<int64_t> bad_;
};

template <typename T>
void score_gradient(const BackwardParams<T>& p, const Sequence& sequence, int64_t group) {
  const int64_t head = sequence.batch * p.groups + group;
  const T* scores = p.scores + head * p.keys + sequence.key_begin;
  const T* threshold = p.threshold + head * p.queries + sequence.query_begin;
  const double* key_sums = p.key_sums + head * p.keys + sequence.key_begin;
  const double* query_sums = p.query_sums + head * p.queries + sequence.query_begin;

  // The queries for which each key is fractional, and how many such keys each query has.
  std::vector<int64_t> begin(sequence.keys), end(sequence.keys);
  std::vector<int64_t> fractional(sequence.queries + 1, 0);
  for (int64_t j = 0; j < sequence.keys; ++j) {
    const int64_t enter = p.pattern.causal ? j + p.pattern.window - sequence.shift() : 0;
    const T* from = threshold + std::clamp<int64_t>(enter, 0, sequence.queries);
    const T* to = threshold + sequence.queries;
    const T* drop = std::partition_point(from, to, [&](T t) { return scores[j] > t; });
    const T* soften = std::partition_point(from, drop, [&](T t) { return !(scores[j] - t < T(1)); });
    begin[j] = soften - threshold;
    end[j] = drop - threshold;
    ++fractional[begin[j]];
    --fractional[end[j]];
  }

  PrefixSums shared(sequence.queries);
  int64_t count = 0;
  for (int64_t i = 0; i < sequence.queries; ++i) {
    count += fractional[i];
    shared.append(i, count > 0 ? query_sums[i] / static_cast<double>(count) : 0.0);
  }
  std::vector<T> gradient(sequence.keys);
  for (int64_t j = 0; j < sequence.keys; ++j)
    gradient[j] = static_cast<T>(key_sums[j] - shared.between(begin[j], end[j]));

  Rows rows = p.grad_scores;
  rows.width = sequence.keys;
  store_row(rows, rows.row(sequence.batch, sequence.key_begin, group), T(1), gradient.data());
}

}  // namespace

template <typename T>
void run_score_gradient(const BackwardParams<T>& params) {
  const int64_t groups = params.groups;
  run_tasks(static_cast<int64_t>(params.sequences.size()) * groups,
            [&] { return [&](int64_t i) { score_gradient(params, params.sequences[i / groups], i % groups); }; });
}

template void run_score_gradient(const BackwardParams<float>&);
template void run_score_gradient(const BackwardParams<double>&);

}  // namespace sparsek::cpu
