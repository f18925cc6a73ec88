#include "cpu/common/tensor.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstring>
#include <vector>

#include "cpu/common/vectorize.h"

namespace sparsek::cpu {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int64_t kPrefetch = 4;  // rows ahead: the hardware cannot guess where a gather goes next

template <typename T, typename Stored>
SPARSEK_INLINE void convert(const Stored* __restrict in, int64_t stride, int64_t width, T factor, T* __restrict out) {
  if (stride == 1) {
    for (int64_t i = 0; i < width; ++i) out[i] = static_cast<T>(in[i]) * factor;
  } else {
    for (int64_t i = 0; i < width; ++i) out[i] = static_cast<T>(in[i * stride]) * factor;
  }
}

// Whether no element has all bits of the exponent set. On integers, since the compiler reorders those freely.
SPARSEK_INLINE bool all_finite(const float* x, int64_t width) {
  uint32_t bad = 0;
  for (int64_t i = 0; i < width; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof(bits));
    bad |= (bits & 0x7f800000u) == 0x7f800000u;
  }
  return bad == 0;
}
SPARSEK_INLINE bool all_finite(const double* x, int64_t width) {
  uint64_t bad = 0;
  for (int64_t i = 0; i < width; ++i) {
    uint64_t bits;
    std::memcpy(&bits, x + i, sizeof(bits));
    bad |= (bits & 0x7ff0000000000000u) == 0x7ff0000000000000u;
  }
  return bad == 0;
}

template <typename T, typename Stored>
SPARSEK_INLINE void load(const Rows& rows, const char* const* row, int64_t count, T factor, T* out, bool* finite) {
  const int64_t bytes = rows.width * static_cast<int64_t>(sizeof(Stored));
  for (int64_t r = 0; r < count; ++r) {
    if (r + kPrefetch < count)
      for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row[r + kPrefetch] + i);
    convert(reinterpret_cast<const Stored*>(row[r]), rows.stride[3], rows.width, factor, out + r * rows.width);
    finite[r] = all_finite(out + r * rows.width, rows.width);
  }
}

template <typename T, typename Stored>
SPARSEK_INLINE void store(Stored* out, int64_t stride, int64_t width, T factor, const T* in) {
  for (int64_t i = 0; i < width; ++i) out[i * stride] = static_cast<Stored>(in[i] * factor);
}

template <typename T>
SPARSEK_INLINE void load_any(const Rows& rows, const char* const* row, int64_t count, T factor, T* out, bool* finite) {
  if (rows.dtype == ScalarType::Float) return load<T, float>(rows, row, count, factor, out, finite);
  if (rows.dtype == ScalarType::BFloat16) return load<T, BFloat16>(rows, row, count, factor, out, finite);
  if (rows.dtype == ScalarType::Half) return load<T, Half>(rows, row, count, factor, out, finite);
  return load<T, double>(rows, row, count, factor, out, finite);
}

template <typename T>
SPARSEK_INLINE void store_any(const Rows& rows, char* row, T factor, const T* in) {
  const int64_t stride = rows.stride[3];
  const int64_t width = rows.width;
  if (rows.dtype == ScalarType::Float) return store(reinterpret_cast<float*>(row), stride, width, factor, in);
  if (rows.dtype == ScalarType::BFloat16) return store(reinterpret_cast<BFloat16*>(row), stride, width, factor, in);
  if (rows.dtype == ScalarType::Half) return store(reinterpret_cast<Half*>(row), stride, width, factor, in);
  return store(reinterpret_cast<double*>(row), stride, width, factor, in);
}

}  // namespace

template <>
SPARSEK_CLONES void load_rows(const Rows& rows, const char* const* row, int64_t count, float factor, float* out,
                              bool* finite) {
  load_any(rows, row, count, factor, out, finite);
}
template <>
SPARSEK_CLONES void load_rows(const Rows& rows, const char* const* row, int64_t count, double factor, double* out,
                              bool* finite) {
  load_any(rows, row, count, factor, out, finite);
}
template <>
SPARSEK_CLONES void store_row(const Rows& rows, char* row, float factor, const float* in) {
  store_any(rows, row, factor, in);
}
template <>
SPARSEK_CLONES void store_row(const Rows& rows, char* row, double factor, const double* in) {
  store_any(rows, row, factor, in);
}

template <typename T>
Tensor transpose_scores(const Tensor& scores) {
  const int64_t batch = scores.size(0), keys = scores.size(1), groups = scores.size(2);
  Tensor table = make_empty(scores, {batch, groups, keys}, scalar_type<T>());
  const Rows columns = score_columns(scores);
  T* out = static_cast<T*>(table.mutable_data_ptr());
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t g = 0; g < groups; ++g) load_row(columns, columns.row(b, 0, g), T(1), out + (b * groups + g) * keys);
  return table;
}
template Tensor transpose_scores<float>(const Tensor&);
template Tensor transpose_scores<double>(const Tensor&);

}  // namespace sparsek::cpu
