#include "cpu/common/sequences.h"

#include <torch/csrc/stable/ops.h>

namespace sparsek::cpu {
namespace {

// Contiguous lengths, if they are lengths at all.
Tensor checked_lengths(const char* name, const Tensor& strided, int64_t total) {
  STD_TORCH_CHECK(
      strided.is_cpu() && strided.scalar_type() == ScalarType::Int && strided.dim() == 1 && strided.size(0) >= 1, name,
      " must be an int32 CPU tensor [sequences + 1], got shape ", shape_of(strided));
  const Tensor lengths = torch::stable::contiguous(strided);
  const int32_t* ends = static_cast<const int32_t*>(lengths.const_data_ptr());
  const int64_t count = lengths.size(0);
  bool rises = ends[0] == 0 && ends[count - 1] == total;
  for (int64_t i = 1; i < count; ++i) rises = rises && ends[i - 1] <= ends[i];
  STD_TORCH_CHECK(rises, name, " must rise from 0 to ", total);
  return lengths;
}

}  // namespace

std::vector<Sequence> list_sequences(const std::optional<Tensor>& cu_seqlens_q,
                                     const std::optional<Tensor>& cu_seqlens_k, int64_t batch, int64_t queries,
                                     int64_t keys) {
  STD_TORCH_CHECK(cu_seqlens_q.has_value() == cu_seqlens_k.has_value(),
                  "cu_seqlens must be given for queries and keys, or for neither");
  std::vector<Sequence> sequences;
  if (!cu_seqlens_q.has_value()) {
    for (int64_t b = 0; b < batch; ++b) sequences.push_back({b, 0, queries, 0, keys});
    return sequences;
  }
  STD_TORCH_CHECK(batch == 1, "packed sequences need batch size 1, got ", batch);
  const Tensor lengths_q = checked_lengths("cu_seqlens_q", *cu_seqlens_q, queries);
  const Tensor lengths_k = checked_lengths("cu_seqlens_k", *cu_seqlens_k, keys);
  const int64_t count = lengths_q.size(0);
  STD_TORCH_CHECK(lengths_k.size(0) == count, "cu_seqlens name ", count - 1, " sequences of queries and ",
                  lengths_k.size(0) - 1, " of keys");
  const int32_t* q = static_cast<const int32_t*>(lengths_q.const_data_ptr());
  const int32_t* k = static_cast<const int32_t*>(lengths_k.const_data_ptr());
  for (int64_t i = 0; i + 1 < count; ++i) sequences.push_back({0, q[i], q[i + 1] - q[i], k[i], k[i + 1] - k[i]});
  return sequences;
}

}  // namespace sparsek::cpu
