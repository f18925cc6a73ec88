// The derivative of softmax over the keys of a tile. Both passes of backward compute it, to the same bits: the sums of
// gate gradients over the keys and over the queries cancel.
#pragma once

#include "cuda/backward/params.h"
#include "cuda/simt/tile.cuh"

namespace sparsek::cuda::simt {

// What a query brings along.
template <typename T>
struct RowState {
  int32_t position;
  T threshold;
  T lse;
  T delta;
};

template <typename T>
__device__ RowState<T> load_row_state(const BackwardParams<T>& p, const QueryTile& tile, int64_t head, int r) {
  const int64_t row = tile.row(r), batch = tile.sequence.batch;
  if (row < 0) return {tile.position(r), T(0), T(0), T(0)};
  const int64_t flat = (batch * p.groups * p.heads_per_group + head) * p.queries + row;
  const T threshold = p.threshold[(batch * p.groups + head / p.heads_per_group) * p.queries + row];
  return {tile.position(r), threshold, p.lse[flat], p.delta[flat]};
}

// Not to be merged with an addition: the two passes add in different places.
__device__ inline float rounded_product(float x, float y) { return __fmul_rn(x, y); }
__device__ inline double rounded_product(double x, double y) { return __dmul_rn(x, y); }

// Of one query and one key; 0 where the key is not seen.
template <typename T>
struct Derivative {
  T weight;      // of the softmax
  T grad_logit;  // gradient of the logit
  T grad_gate;   // gradient of the gate where that is fractional
};

template <typename T>
__device__ Derivative<T> differentiate(const Columns<T>& columns, int column, const RowState<T>& row, bool hard,
                                       T logit, T grad_weight) {
  if (!columns.sees(row.position, column)) return {T(0), T(0), T(0)};
  const bool lost = isnan(row.threshold);
  const T above = columns.score[column] - row.threshold;
  const bool fractional = columns.gated(row.position, column) && above < T(1) && above > T(0);
  const T gate = lost ? row.threshold : fractional && !hard ? above : T(1);
  const T ungated = exp(logit - row.lse);  // softmax weight over gate
  const T grad_gate = rounded_product(ungated, grad_weight - row.delta);
  return {rounded_product(gate, ungated), rounded_product(gate, grad_gate), fractional || lost ? grad_gate : T(0)};
}

}  // namespace sparsek::cuda::simt
