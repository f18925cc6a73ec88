// What the forward and the backward kernel both read.
#pragma once

#include <cstdint>
#include <vector>

#include "common/params.h"
#include "cpu/common/sequences.h"
#include "cpu/common/tensor.h"

namespace sparsek::cpu {

template <typename T>
struct AttentionParams : AttentionInputs<T, std::vector<Sequence>> {
  // Row of a query in tensors [B, H, Mq].
  int64_t flat_query(int64_t batch, int64_t head, int64_t row) const {
    return (batch * this->groups * this->heads_per_group + head) * this->queries + row;
  }
};

}  // namespace sparsek::cpu
