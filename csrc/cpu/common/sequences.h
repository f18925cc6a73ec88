// The sequences of a call: the batch entries, or the parts of a packed one.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "cpu/common/tensor.h"

namespace sparsek::cpu {

struct Sequence {
  int64_t batch;
  int64_t query_begin;  // row of the batch entry
  int64_t queries;
  int64_t key_begin;
  int64_t keys;

  // Position of query 0 of a causal sequence; negative where there are more queries than keys.
  int64_t shift() const { return keys - queries; }
};

// Throws unless the cumulative lengths rise from 0 to the sizes given.
std::vector<Sequence> list_sequences(const std::optional<Tensor>& cu_seqlens_q,
                                     const std::optional<Tensor>& cu_seqlens_k, int64_t batch, int64_t queries,
                                     int64_t keys);

}  // namespace sparsek::cpu
