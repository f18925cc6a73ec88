// The operator `append`: one more token in a cache, and what its query sees.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/append/params.h"
#include "cuda/common/device.h"

namespace sparsek::cuda {
namespace {

template <typename T>
std::tuple<Tensor, Tensor> run_append(const Tensor& key, const Tensor& value, const Tensor& scores,
                                      const CacheTensors& cache, int64_t num_keys, int64_t window, bool hard) {
  const OnDeviceOf device(key);
  AppendParams<T> params = make_append<T>(key, value, scores, cache, num_keys, window, hard);
  STD_TORCH_CHECK(params.cache.slots * static_cast<int64_t>(sizeof(T)) <= kMaxSlotBytes,
                  "on a GPU a cache has at most ", kMaxSlotBytes / static_cast<int64_t>(sizeof(T)), " slots, got ",
                  params.cache.slots);
  Tensor threshold = make_empty(key, {params.batch, params.groups, 1}, scalar_type<T>());
  Tensor expiry = make_empty(key, {params.batch, params.groups, params.cache.slots + window}, ScalarType::Int);
  params.threshold = static_cast<T*>(threshold.mutable_data_ptr());
  params.expiry = static_cast<int32_t*>(expiry.mutable_data_ptr());
  launch_append(params, device.stream());
  return {threshold, expiry};
}

std::tuple<Tensor, Tensor> append(const Tensor& key, const Tensor& value, const Tensor& scores, const Tensor& key_cache,
                                  const Tensor& value_cache, const Tensor& score, const Tensor& waiting,
                                  const Tensor& position, const Tensor& next, const Tensor& length,
                                  const Tensor& overflow, int64_t num_keys, int64_t window, bool hard) {
  const CacheTensors cache{key_cache, value_cache, score, waiting, position, next, length, overflow};
  const auto run = key.scalar_type() == ScalarType::Double ? run_append<double> : run_append<float>;
  return run(with_dense_rows(key), with_dense_rows(value), scores, cache, num_keys, window, hard);
}

}  // namespace
}  // namespace sparsek::cuda

STABLE_TORCH_LIBRARY_IMPL(xformers_sparsek, CUDA, m) { m.impl("append", TORCH_BOX(&sparsek::cuda::append)); }
