// Which keys a query sees, as the operators pass it on: shared by all devices.
#pragma once

#include <cstdint>
#include <limits>

namespace sparsek {

// Positions count from the start of a sequence; query i of a causal sequence sits at position i + Mk - Mq.
//
// Thresholds never fall along a causal sequence, so each key is seen by one interval of positions, and the whole
// pattern is one number per query and one per key:
//   threshold[b, g, i]: gate of a candidate = clip(score - threshold, 0, 1).
//   expiry[b, g, j]:    the first position that no longer sees key j; kNever where there is none.
// Causal: key j is seen from position j on, with gate 1 for `window` positions and by its score from then on.
// Not causal: every query sees a key or none does; expiry is kNever or 0.
struct Pattern {
  int64_t window;
  bool causal;
  bool hard;  // gates are 1 wherever a key is seen; thresholds serve the gradient alone
};

constexpr int32_t kNever = std::numeric_limits<int32_t>::max();

}  // namespace sparsek
