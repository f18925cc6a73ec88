// How the queries of a call are cut into tasks and tiles, and which keys each tile sees.
#pragma once

#include <cstdint>
#include <vector>

#include "common/pattern.h"
#include "cpu/common/sequences.h"

namespace sparsek::cpu {

// A run of queries of one sequence and key/value head, worked on by one thread. Positions of a sequence that is not
// causal are its query rows.
struct Segment {
  int64_t sequence;
  int64_t group;
  int64_t stream;  // numbers the pairs of sequence and group
  int64_t index;   // among the segments of its stream
  int32_t begin;   // positions
  int32_t end;
  const int32_t* earlier;  // [num_earlier] keys before `begin` that its first query still sees, rising
  int32_t num_earlier;
  bool causal;

  // The keys that any query of the segment may see: the earlier ones, then, if causal, those of its own positions.
  int32_t num_slots() const { return num_earlier + (causal ? end - begin : 0); }
  int32_t key(int32_t slot) const { return slot < num_earlier ? earlier[slot] : begin + slot - num_earlier; }
};

struct Plan {
  std::vector<Segment> segments;  // in the order in which they are handed out
  int64_t streams;
  int64_t tile;                               // query positions per tile
  std::vector<std::vector<int32_t>> earlier;  // [streams] memory behind Segment::earlier
};

// expiry [B, G, Mk]. Takes memory and time linear in keys and queries: a segment has at least half as many queries as
// earlier keys.
Plan make_plan(const std::vector<Sequence>& sequences, const Pattern& pattern, int64_t groups, int64_t heads_per_group,
               const int32_t* expiry, int64_t keys);

}  // namespace sparsek::cpu
