// Exponentials that the compiler may call for a whole vector at once.
#pragma once

#include <cmath>  // first: a later declaration without the attribute would take the vector variants away

#include "cpu/common/vectorize.h"

extern "C" {
SPARSEK_SIMD_MATH float expf(float) noexcept;
SPARSEK_SIMD_MATH double exp(double) noexcept;
}

namespace sparsek::cpu {

SPARSEK_INLINE float exponential(float x) { return expf(x); }
SPARSEK_INLINE double exponential(double x) { return exp(x); }

}  // namespace sparsek::cpu
