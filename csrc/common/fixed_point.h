// Sums of scores in fixed point: exact, and so the same on all devices, in any order.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/host_device.h"

namespace sparsek {

// Scores in units of 2^-62, modulo 4: sums of differences are exact, and so independent of their order.
SPARSEK_HOST_DEVICE inline uint64_t fixed_point(uint64_t mantissa, int shift, bool negative) {
  const uint64_t size = shift >= 64 || shift <= -64 ? 0 : shift >= 0 ? mantissa << shift : mantissa >> -shift;
  return negative ? 0 - size : size;
}

SPARSEK_HOST_DEVICE inline uint64_t fixed_point(float score) {
  uint32_t bits;
  memcpy(&bits, &score, sizeof(bits));
  const int exponent = bits >> 23 & 0xff;
  const uint64_t mantissa = (bits & 0x7fffff) | (exponent ? 0x800000 : 0);
  return fixed_point(mantissa, (exponent ? exponent : 1) - 150 + 62, bits >> 31);
}

SPARSEK_HOST_DEVICE inline uint64_t fixed_point(double score) {
  uint64_t bits;
  memcpy(&bits, &score, sizeof(bits));
  const int exponent = bits >> 52 & 0x7ff;
  const uint64_t mantissa = (bits & 0xfffffffffffff) | (exponent ? 0x10000000000000 : 0);
  return fixed_point(mantissa, (exponent ? exponent : 1) - 1075 + 62, bits >> 63);
}

// Of scores less than 2 apart.
template <typename T>
SPARSEK_HOST_DEVICE int64_t fixed_difference(T a, T b) {
  return static_cast<int64_t>(fixed_point(a) - fixed_point(b));
}

SPARSEK_HOST_DEVICE inline double to_double(__int128 fixed) {
  const bool negative = fixed < 0;
  const unsigned __int128 size = negative ? -fixed : fixed;
  const double high = static_cast<double>(static_cast<uint64_t>(size >> 64));
  const double sum = (high * 0x1p64 + static_cast<double>(static_cast<uint64_t>(size))) * 0x1p-62;
  return negative ? -sum : sum;
}

}  // namespace sparsek
