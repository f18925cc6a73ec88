#include "cpu/forward/softmax.h"

#include <limits>

#include "cpu/common/math.h"

namespace sparsek::cpu {
namespace {

// Pointers are copied to locals, and what is not seen is computed and thrown away: both keep the loops free of
// branches.
template <typename T>
SPARSEK_INLINE T seen_max_of(const T* __restrict logits, const Columns<T>& columns, int64_t count, int32_t position) {
  const int32_t* __restrict seen_from = columns.seen_from;
  const int32_t* __restrict expiry = columns.expiry;
  const T lowest = -std::numeric_limits<T>::infinity();
  T maximum = lowest;
#pragma omp simd reduction(max : maximum)
  for (int64_t c = 0; c < count; ++c) {
    const T logit = (seen_from[c] <= position) & (position < expiry[c]) ? logits[c] : lowest;
    maximum = logit > maximum ? logit : maximum;
  }
  return maximum;
}

template <typename T>
SPARSEK_INLINE T weigh_row(T* __restrict logits, const Columns<T>& columns, int64_t count, int32_t position,
                           T threshold, bool hard, T maximum) {
  const int32_t* __restrict seen_from = columns.seen_from;
  const int32_t* __restrict expiry = columns.expiry;
  const int32_t* __restrict gated_from = columns.gated_from;
  const T* __restrict score = columns.score;
  const int32_t gated_position = hard ? -1 : position;  // before any key is gated
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < count; ++c) {
    const T above = score[c] - threshold;
    const T gate = (gated_position >= gated_from[c]) & (above < T(1)) ? above : T(1);
    const T weight = gate * exponential(logits[c] - maximum);
    const T kept = (seen_from[c] <= position) & (position < expiry[c]) ? weight : T(0);
    logits[c] = kept;
    sum += kept;
  }
  return sum;
}

}  // namespace

template <>
SPARSEK_CLONES float seen_max(const float* logits, const Columns<float>& columns, int64_t count, int32_t position) {
  return seen_max_of(logits, columns, count, position);
}
template <>
SPARSEK_CLONES double seen_max(const double* logits, const Columns<double>& columns, int64_t count, int32_t position) {
  return seen_max_of(logits, columns, count, position);
}
template <>
SPARSEK_CLONES float weigh(float* logits, const Columns<float>& columns, int64_t count, int32_t position,
                           float threshold, bool hard, float maximum) {
  return weigh_row(logits, columns, count, position, threshold, hard, maximum);
}
template <>
SPARSEK_CLONES double weigh(double* logits, const Columns<double>& columns, int64_t count, int32_t position,
                            double threshold, bool hard, double maximum) {
  return weigh_row(logits, columns, count, position, threshold, hard, maximum);
}

}  // namespace sparsek::cpu
