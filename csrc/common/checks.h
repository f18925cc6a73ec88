// Checks that the operators share on all devices. Python names all reasons at once before it comes here; these
// keep a direct call of the operators from reading or writing out of bounds.
#pragma once

#include <optional>

#include "common/pattern.h"
#include "common/tensor.h"

namespace sparsek {

// Throws for a negative window, or one that is not causal.
Pattern make_pattern(int64_t window, bool causal, bool hard);

struct SelectShape {
  int64_t batch, keys, groups;
  bool wide;  // float64
};

SelectShape check_select(const Tensor& scores, int64_t num_queries, int64_t num_keys);

struct AttentionShape {
  int64_t batch, queries, keys, heads, groups;
};

AttentionShape check_attention(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& scores,
                               const Tensor& threshold, const Tensor& expiry);

// What backward reads besides.
void check_gradients(const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& query,
                     const Tensor& value, const Tensor& out, const Tensor& lse, const AttentionShape& shape);

}  // namespace sparsek
