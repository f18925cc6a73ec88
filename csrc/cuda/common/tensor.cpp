#include "cuda/common/tensor.h"

#include <torch/csrc/stable/ops.h>

namespace sparsek::cuda {
namespace {

Tensor checked_lengths(const char* name, const Tensor& lengths, const Tensor& reference) {
  STD_TORCH_CHECK(lengths.scalar_type() == ScalarType::Int && lengths.dim() == 1 && lengths.size(0) >= 1, name,
                  " must be an int32 tensor [sequences + 1], got shape ", shape_of(lengths));
  check_device(name, lengths, reference);
  return torch::stable::contiguous(lengths);
}

}  // namespace

template <typename T>
Tensor transpose_scores(const Tensor& scores) {
  return torch::stable::contiguous(torch::stable::to(torch::stable::transpose(scores, 1, 2), scalar_type<T>()));
}
template Tensor transpose_scores<float>(const Tensor&);
template Tensor transpose_scores<double>(const Tensor&);

SequenceLengths make_sequences(const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k,
                               const Tensor& reference, int64_t batch, int64_t queries, int64_t keys) {
  STD_TORCH_CHECK(cu_seqlens_q.has_value() == cu_seqlens_k.has_value(),
                  "cu_seqlens must be given for queries and keys, or for neither");
  if (!cu_seqlens_q.has_value()) return {Tensor(), Tensor(), {nullptr, nullptr, batch, queries, keys}};
  STD_TORCH_CHECK(batch == 1, "packed sequences need batch size 1, got ", batch);
  const Tensor cu_q = checked_lengths("cu_seqlens_q", *cu_seqlens_q, reference);
  const Tensor cu_k = checked_lengths("cu_seqlens_k", *cu_seqlens_k, reference);
  const int64_t count = cu_q.size(0) - 1;
  STD_TORCH_CHECK(cu_k.size(0) - 1 == count, "cu_seqlens name ", count, " sequences of queries and ", cu_k.size(0) - 1,
                  " of keys");
  return {cu_q,
          cu_k,
          {static_cast<const int32_t*>(cu_q.const_data_ptr()), static_cast<const int32_t*>(cu_k.const_data_ptr()),
           count, queries, keys}};
}

}  // namespace sparsek::cuda
