// Places that are filled and emptied in turn, each of which has barriers.
#pragma once

#include <cstdint>

namespace sparsek::cuda::sm90 {

// A place in a ring, and the parity of the barriers there.
template <int kPlaces>
struct Ring {
  int place = 0;
  uint32_t phase = 0;

  __device__ void advance() {
    if (++place == kPlaces) place = 0, phase ^= 1;
  }
};

}  // namespace sparsek::cuda::sm90
