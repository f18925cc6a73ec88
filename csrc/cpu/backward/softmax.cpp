#include "cpu/backward/softmax.h"

#include "cpu/common/math.h"

namespace sparsek::cpu {
namespace {

// Pointers are copied to locals, and what is not seen is computed and thrown away: both keep the loop free of branches.
template <typename T>
SPARSEK_INLINE T differentiate_row(T* __restrict logits, T* __restrict grad_weights, const Columns<T>& columns,
                                   int64_t count, const RowState<T>& row, bool hard, T* __restrict key_sums) {
  const int32_t* __restrict seen_from = columns.seen_from;
  const int32_t* __restrict expiry = columns.expiry;
  const int32_t* __restrict gated_from = columns.gated_from;
  const T* __restrict score = columns.score;
  const int32_t position = row.position;
  const T threshold = row.threshold, lse = row.lse, delta = row.delta;
  const T hard_gate = hard ? T(1) : T(0);  // gates are at least this
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < count; ++c) {
    const bool seen = (seen_from[c] <= position) & (position < expiry[c]);
    const T above = score[c] - threshold;
    const bool fractional = (position >= gated_from[c]) & (above < T(1)) & (above > T(0)) & seen;
    const T gate = fractional & (above > hard_gate) ? above : T(1);
    const T ungated = exponential(logits[c] - lse);  // softmax weight over gate
    const T change = grad_weights[c] - delta;
    const T weight = seen ? gate * ungated : T(0);
    const T grad_logit = seen ? gate * ungated * change : T(0);
    const T grad_gate = fractional ? ungated * change : T(0);
    logits[c] = weight;
    grad_weights[c] = grad_logit;
    key_sums[c] += grad_gate;
    sum += grad_gate;
  }
  return sum;
}

}  // namespace

template <>
SPARSEK_CLONES float differentiate(float* logits, float* grad_weights, const Columns<float>& columns, int64_t count,
                                   const RowState<float>& row, bool hard, float* key_sums) {
  return differentiate_row(logits, grad_weights, columns, count, row, hard, key_sums);
}
template <>
SPARSEK_CLONES double differentiate(double* logits, double* grad_weights, const Columns<double>& columns, int64_t count,
                                    const RowState<double>& row, bool hard, double* key_sums) {
  return differentiate_row(logits, grad_weights, columns, count, row, hard, key_sums);
}

}  // namespace sparsek::cpu
