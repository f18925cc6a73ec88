#include "common/cache.h"

#include <torch/csrc/stable/ops.h>

namespace sparsek {
namespace {

template <typename T>
T* contiguous_data(const char* name, const Tensor& tensor, ScalarType dtype, std::initializer_list<int64_t> sizes,
                   const Tensor& reference) {
  check_sizes(name, tensor, sizes);
  check_device(name, tensor, reference);
  STD_TORCH_CHECK(tensor.scalar_type() == dtype && tensor.is_contiguous(), name,
                  " must be contiguous, in the dtype that the cache has for it");
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace

Tensor with_dense_rows(const Tensor& tensor) {
  return tensor.dim() == 0 || tensor.stride(tensor.dim() - 1) == 1 ? tensor : torch::stable::contiguous(tensor);
}

template <typename T>
AppendParams<T> make_append(const Tensor& key, const Tensor& value, const Tensor& scores, const CacheTensors& cache,
                            int64_t num_keys, int64_t window, bool hard) {
  STD_TORCH_CHECK(num_keys >= 1 && window >= 0, "append needs num_keys >= 1 and window >= 0, got ", num_keys, " and ",
                  window);
  STD_TORCH_CHECK(key.dim() == 4 && key.size(1) == 1, "key must be [B, 1, G, K], got shape ", shape_of(key));
  const int64_t batch = key.size(0), groups = key.size(2);
  check_sizes("value", value, {batch, 1, groups, -1});
  check_sizes("scores", scores, {batch, 1, groups});
  check_sizes("position", cache.position, {batch, groups, -1});
  check_device("value", value, key);
  check_device("scores", scores, key);
  STD_TORCH_CHECK(
      value.scalar_type() == key.scalar_type() && is_supported(key.scalar_type()) && is_supported(scores.scalar_type()),
      "key, value and scores must be float64, float32, bfloat16 or float16");
  const int64_t slots = cache.position.size(2), places = slots + window;
  STD_TORCH_CHECK(slots > num_keys, "a cache for ", num_keys, " keys needs at least as many slots and one, got ",
                  slots);

  AppendParams<T> params{};
  params.key = rows_of(key);
  params.value = rows_of(value);
  params.columns = score_columns(scores);
  Cache<T>& c = params.cache;
  const ScalarType dtype = key.scalar_type();
  c.key = contiguous_data<char>("key_cache", cache.key, dtype, {batch, groups, places, key.size(3)}, key);
  c.value = contiguous_data<char>("value_cache", cache.value, dtype, {batch, groups, places, value.size(3)}, key);
  c.score = contiguous_data<T>("score", cache.score, scalar_type<T>(), {batch, groups, places}, key);
  c.waiting = contiguous_data<T>("waiting", cache.waiting, scalar_type<T>(), {batch, groups, window}, key);
  c.position = contiguous_data<int32_t>("position", cache.position, ScalarType::Int, {batch, groups, slots}, key);
  c.next = contiguous_data<int32_t>("next", cache.next, ScalarType::Int, {batch, groups}, key);
  c.length = contiguous_data<int64_t>("length", cache.length, ScalarType::Long, {batch, groups}, key);
  c.overflow = contiguous_data<int64_t>("overflow", cache.overflow, ScalarType::Long, {batch, groups}, key);
  c.slots = slots;
  c.window = window;
  c.key_bytes = key.size(3) * params.key.element_size;
  c.value_bytes = value.size(3) * params.value.element_size;
  params.batch = batch;
  params.groups = groups;
  params.num_keys = num_keys;
  params.hard = hard;
  return params;
}

template AppendParams<float> make_append(const Tensor&, const Tensor&, const Tensor&, const CacheTensors&, int64_t,
                                         int64_t, bool);
template AppendParams<double> make_append(const Tensor&, const Tensor&, const Tensor&, const CacheTensors&, int64_t,
                                          int64_t, bool);

}  // namespace sparsek
