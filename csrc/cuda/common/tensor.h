// Views of CUDA tensors as the kernels read them.
#pragma once

#include <optional>

#include "common/checks.h"
#include "common/tensor.h"
#include "cuda/common/params.h"

namespace sparsek::cuda {

// scores [B, Mk, G] of any dtype as contiguous [B, G, Mk] of T.
template <typename T>
Tensor transpose_scores(const Tensor& scores);

// The sequences of a call, and the tensors they point into: to be kept until the kernels are launched.
struct SequenceLengths {
  Tensor cu_q, cu_k;  // undefined where every batch entry is one sequence
  Sequences sequences;

  bool packed() const { return sequences.cu_q != nullptr; }
};

// What the lengths are, only the device knows: kernels clamp them.
SequenceLengths make_sequences(const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k,
                               const Tensor& reference, int64_t batch, int64_t queries, int64_t keys);

}  // namespace sparsek::cuda
