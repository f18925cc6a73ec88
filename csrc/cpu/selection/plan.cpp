#include "cpu/selection/plan.h"

#include <algorithm>

namespace sparsek::cpu {
namespace {

constexpr int64_t kTileRows = 128;    // rows of the matrix products: positions times heads per group
constexpr int64_t kMinTile = 16;      // positions
constexpr int64_t kMinSegment = 512;  // positions; long enough that adding up a segment's gradients costs little

struct Stream {
  std::vector<int32_t> earlier;
  std::vector<int64_t> earlier_begin;  // per segment
  std::vector<Segment> segments;

  void add(Segment segment, const std::vector<int32_t>& seen) {
    segment.index = static_cast<int64_t>(segments.size());
    segment.num_earlier = static_cast<int32_t>(seen.size());
    earlier_begin.push_back(static_cast<int64_t>(earlier.size()));
    earlier.insert(earlier.end(), seen.begin(), seen.end());
    segments.push_back(segment);
  }
};

// Segments start at multiples of the tile, counted from position 0, so that a query falls into the same tile whether or
// not the queries before it are asked for.
void cut_causal(const Sequence& sequence, const int32_t* expiry, int64_t tile, const Segment& blank, Stream& stream) {
  if (sequence.queries == 0) return;
  const int32_t end = static_cast<int32_t>(sequence.keys);
  int32_t begin = static_cast<int32_t>(std::max<int64_t>(sequence.shift(), 0) / tile * tile);
  std::vector<int32_t> seen;
  for (int32_t key = 0; key < begin; ++key)
    if (expiry[key] > begin) seen.push_back(key);
  while (begin < end) {
    const int64_t length = std::max<int64_t>(kMinSegment, static_cast<int64_t>(seen.size()) / 2);
    Segment segment = blank;
    segment.begin = begin;
    segment.end = static_cast<int32_t>(std::min<int64_t>(end, begin + (length + tile - 1) / tile * tile));
    stream.add(segment, seen);
    const auto expired = [&](int32_t key) { return expiry[key] <= segment.end; };
    seen.erase(std::remove_if(seen.begin(), seen.end(), expired), seen.end());
    for (int32_t key = begin; key < segment.end; ++key)
      if (!expired(key)) seen.push_back(key);
    begin = segment.end;
  }
}

void cut_for_all(const Sequence& sequence, const int32_t* expiry, int64_t tile, const Segment& blank, Stream& stream) {
  std::vector<int32_t> seen;
  for (int64_t key = 0; key < sequence.keys; ++key)
    if (expiry[key] == kNever) seen.push_back(static_cast<int32_t>(key));
  const int64_t length = (kMinSegment + tile - 1) / tile * tile;
  for (int64_t begin = 0; begin < sequence.queries; begin += length) {
    Segment segment = blank;
    segment.begin = static_cast<int32_t>(begin);
    segment.end = static_cast<int32_t>(std::min(sequence.queries, begin + length));
    if (begin == 0) {
      stream.add(segment, seen);
    } else {  // every segment sees the same keys
      segment.index = static_cast<int64_t>(stream.segments.size());
      segment.num_earlier = stream.segments.front().num_earlier;
      stream.earlier_begin.push_back(0);
      stream.segments.push_back(segment);
    }
  }
}

}  // namespace

Plan make_plan(const std::vector<Sequence>& sequences, const Pattern& pattern, int64_t groups, int64_t heads_per_group,
               const int32_t* expiry, int64_t keys) {
  Plan plan;
  plan.tile = std::max(kMinTile, kTileRows / heads_per_group / kMinTile * kMinTile);
  std::vector<Stream> streams;
  size_t longest = 0;
  for (size_t s = 0; s < sequences.size(); ++s) {
    for (int64_t group = 0; group < groups; ++group) {
      Segment blank{};
      blank.sequence = static_cast<int64_t>(s);
      blank.group = group;
      blank.stream = static_cast<int64_t>(streams.size());
      blank.causal = pattern.causal;
      const int32_t* own = expiry + (sequences[s].batch * groups + group) * keys + sequences[s].key_begin;
      streams.emplace_back();
      (pattern.causal ? cut_causal : cut_for_all)(sequences[s], own, plan.tile, blank, streams.back());
      longest = std::max(longest, streams.back().segments.size());
    }
  }
  // Streams take turns, so that threads seldom wait for each other when gradients are added up in order.
  for (size_t i = 0; i < longest; ++i) {
    for (Stream& stream : streams) {
      if (i >= stream.segments.size()) continue;
      stream.segments[i].earlier = stream.earlier.data() + stream.earlier_begin[i];
      plan.segments.push_back(stream.segments[i]);
    }
  }
  plan.streams = static_cast<int64_t>(streams.size());
  for (Stream& stream : streams) plan.earlier.push_back(std::move(stream.earlier));  // keeps the addresses
  return plan;
}

}  // namespace sparsek::cpu
