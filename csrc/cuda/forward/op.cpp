// The operator `forward`: checks, parameters, launch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <limits>
#include <string>
#include <tuple>
#include <type_traits>

#include "common/checks.h"
#include "cuda/common/device.h"
#include "cuda/common/kernels.h"
#include "cuda/common/tensor.h"
#include "cuda/forward/params.h"
#include "cuda/plan/plan.h"
#include "cuda/sm80/decode/launch.h"
#include "cuda/sm80/forward/launch.h"
#include "cuda/sm90/forward/launch.h"
#include "cuda/sm90/short_forward/launch.h"

namespace sparsek::cuda {
namespace {

#ifdef SPARSEK_SM90
constexpr WidestHeads kWidest{kMaxForwardWidthSm80, kMaxForwardWidthSm90, 0};
#else
constexpr WidestHeads kWidest{kMaxForwardWidthSm80, 0, 0};
#endif

// Whether all queries of a key/value head see the same few keys, for which Hopper has a kernel of its own.
bool is_short(Kernel kernel, const AttentionShape& shape, const Pattern& pattern, const SequenceLengths& lengths) {
  return kernel == Kernel::kSm90 && !pattern.causal && !lengths.packed() && shape.keys <= kMaxShortKeysSm90;
}

WidestHeads widest_of(const AttentionShape& shape, const SequenceLengths& lengths) {
  WidestHeads widest = kWidest;
  if (shape.queries <= kMaxDecodeQueries && !lengths.packed()) widest.decode = kMaxDecodeWidth;
  return widest;
}

// `short_call`, and the kernel for few queries: they read `scores` themselves, and params.scores is no table.
template <typename T>
void run(Kernel kernel, [[maybe_unused]] bool short_call, const ForwardParams<T>& params, const Tensor& scores,
         const OnDeviceOf& device) {
  if constexpr (std::is_same_v<T, float>) {
#ifdef SPARSEK_SM90
    if (short_call)
      return run_short_forward_sm90(params, score_columns(scores), device.multiprocessors(), device.stream());
#endif
    if (kernel == Kernel::kDecode) {
      const Tensor columns = torch::stable::to(scores, ScalarType::Float);
      return run_decode(params, score_columns(columns), scores, device.multiprocessors(), device.stream());
    }
    if (kernel != Kernel::kSimt) {
      const int64_t rows = kernel == Kernel::kSm90 ? kForwardRowsSm90 : kForwardRowsSm80;
      const PlanMemory memory = make_plan(params, forward_run_size(params.sequences, rows), scores, device.stream());
#ifdef SPARSEK_SM90
      if (kernel == Kernel::kSm90)
        return run_forward_sm90(params, memory.plan, scores, device.multiprocessors(), device.stream());
#endif
      return run_forward_sm80(params, memory.plan, device.stream());
    }
  }
  run_forward_simt(params, device.stream());
}

template <typename T>
std::tuple<Tensor, Tensor> launch_forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                          const Tensor& scores, const Tensor& threshold, const Tensor& expiry,
                                          const AttentionShape& shape, double scale, const Pattern& pattern,
                                          const SequenceLengths& lengths, ScalarType dtype,
                                          const std::optional<std::string>& name) {
  const OnDeviceOf device(query);
  const Kernel kernel = choose_kernel(name, device, widest_of(shape, lengths), query, value);
  const bool short_call = is_short(kernel, shape, pattern, lengths);
  const Tensor table = short_call || kernel == Kernel::kDecode ? scores : transpose_scores<T>(scores);
  // These kernels write their own dtype or float32.
  const bool convert = (kernel == Kernel::kSm90 || kernel == Kernel::kDecode) && dtype != query.scalar_type() &&
                       dtype != ScalarType::Float;
  Tensor out =
      make_empty(query, {shape.batch, shape.queries, shape.heads, value.size(3)}, convert ? ScalarType::Float : dtype);
  Tensor lse = make_empty(query, {shape.batch, shape.heads, shape.queries}, scalar_type<T>());
  if (lengths.packed()) {  // whose queries may lie outside of every sequence
    torch::stable::zero_(out);
    torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
  }
  ForwardParams<T> params;
  const bool align = kernel != Kernel::kSimt;
  const Tensor q = align ? with_aligned_rows(query) : query, k = align ? with_aligned_rows(key) : key,
               v = align ? with_aligned_rows(value) : value;
  set_inputs(params, q, k, v, table, threshold, expiry, shape, scale, pattern, lengths.sequences);
  params.out = rows_of(out);
  params.lse = static_cast<T*>(lse.mutable_data_ptr());
  run(kernel, short_call, params, scores, device);
  return {convert ? torch::stable::to(out, dtype) : out, lse};
}

std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& scores,
                                   const Tensor& threshold, const Tensor& expiry, std::optional<Tensor> cu_seqlens_q,
                                   std::optional<Tensor> cu_seqlens_k, int64_t window, bool causal, bool hard,
                                   double scale, std::optional<ScalarType> out_dtype, std::optional<std::string> kernel,
                                   std::optional<std::string> /* backward_kernel: for the derivative */) {
  const Pattern pattern = make_pattern(window, causal, hard);
  const AttentionShape shape = check_attention(query, key, value, scores, threshold, expiry);
  const SequenceLengths lengths =
      make_sequences(cu_seqlens_q, cu_seqlens_k, query, shape.batch, shape.queries, shape.keys);
  const ScalarType dtype = out_dtype.value_or(query.scalar_type());
  STD_TORCH_CHECK(is_supported(dtype), "out_dtype must be float64, float32, bfloat16 or float16");
  const auto launch = query.scalar_type() == ScalarType::Double ? launch_forward<double> : launch_forward<float>;
  return launch(query, key, value, scores, threshold, expiry, shape, scale, pattern, lengths, dtype, kernel);
}

}  // namespace
}  // namespace sparsek::cuda

STABLE_TORCH_LIBRARY_IMPL(xformers_sparsek, CUDA, m) { m.impl("forward", TORCH_BOX(&sparsek::cuda::forward)); }
