// The producer: finds the units of each tile and brings their rows into shared memory. Two warps bring keys, one
// values, and one queries, each at its own pace.
#pragma once

#include <cfloat>

#include "cuda/plan/tile.cuh"
#include "cuda/sm90/forward/traits.cuh"
#include "cuda/sm90/ptx.cuh"
#include "cuda/sm90/units.cuh"

namespace sparsek::cuda::sm90 {

// Whether the first pass met values that were not finite in a tile.
template <typename Traits>
__device__ bool is_suspect(const ForwardArguments& a, int64_t place) {
  uint32_t found = 0;
#pragma unroll
  for (int consumer = 0; consumer < Traits::kConsumers; ++consumer)
    found |= a.suspects[place * Traits::kConsumers + consumer];
  return found != 0;
}

struct NumberedTile {
  QueryTile tile;
  int64_t place;  // among `suspects`; in the careful pass the number itself
};

// The tile of this number. Tiles of a few heads are neighbours, so that their keys stay in the L2 cache; of these long
// ones come first, so that CTAs end together.
template <typename Traits>
__device__ NumberedTile find_tile(const ForwardArguments& a, int64_t number) {
  const int64_t packs = divide(a.work, a.num_tiles), near = Traits::kCareful ? packs : 16;
  const int64_t first = divide(number, near * a.num_tiles) * near, among = min(near, packs - first);
  const int64_t rank = number - first * a.num_tiles, row = divide(rank, among);
  const int64_t pack = a.first_pack + first + rank - row * among;
  return {find_query_tile(a.params, a.tiles, a.num_tiles - 1 - row, pack * a.heads, a.heads), row * a.packs + pack};
}

// Calls visit(tile) for each tile with keys that the producer of queries has taken. For all lanes of a warp together.
template <typename Traits, typename Visit>
__device__ void for_each_tile(const ForwardArguments& a, typename Traits::Shared& s, const Visit& visit) {
  Ring<Traits::kQueryStages> ring;
  while (true) {
    barrier_wait(s.number_full[ring.place], ring.phase);
    const int64_t number = s.number[ring.place];
    if (number < 0) return;
    barrier_arrive_as_warp(s.query_empty[ring.place], threadIdx.x % 32);
    const QueryTile tile = find_tile<Traits>(a, number).tile;
    if (tile.has_keys()) visit(tile);
    ring.advance();
  }
}

template <int kWidth>
constexpr int64_t kUnitBytes = int64_t{kUnit} * kWidth * 2;

// The copies of a run's keys or values, or null.
template <int kWidth>
__device__ const char* find_copies(const Compact& compact, const char* copies, const RunView& run) {
  const int32_t first = compact.first_unit == nullptr || run.list < 0 ? -1 : compact.first_unit[run.list];
  return first < 0 ? nullptr : copies + first * kUnitBytes<kWidth>;
}

// One thread brings a unit of copies.
template <int kWidth, typename Tile>
__device__ void bring_unit(const char* copies, Tile& tile, uint64_t& barrier) {
  static_assert(sizeof(Tile) == kUnitBytes<kWidth>);
  barrier_expect(barrier, kUnitBytes<kWidth>);
  copy_bulk(shared_address(&tile), copies, kUnitBytes<kWidth>, barrier);
}

template <typename Traits>
class KeyProducer {
 public:
  __device__ KeyProducer(const ForwardArguments& a, typename Traits::Shared& shared)
      : a_(a),
        s_(shared),
        copier_(a.params.key),
        thread_(static_cast<int>(threadIdx.x) % 64),
        lane_(threadIdx.x % 32),
        cursor_(shared.blocks[threadIdx.x / 32]) {}

  __device__ void run() {
    for_each_tile<Traits>(a_, s_, [&](const QueryTile& tile) { run_tile(tile); });
  }

 private:
  __device__ void run_tile(const QueryTile& tile) {
    cursor_.start(find_blocks(a_.params, a_.plan, tile));
    base_ = a_.params.key.row(tile.sequence.batch, tile.sequence.key_begin, tile.group);
    keys_ = tile.sequence.keys;
    copies_ = find_copies<Traits::kWidth>(a_.compact, a_.compact.key, cursor_.blocks().run);
    highest_ = highest_threshold(tile);
    int32_t unit = cursor_.next();
    if (unit < 0) return;
    look_up(unit);
    while (unit >= 0) {
      const int32_t after = cursor_.next();
      load(after < 0);
      if (after >= 0) look_up(after);
      unit = after;
    }
  }

  // What the gates of the tile's last query are compared with: no other threshold is higher.
  __device__ float highest_threshold(const QueryTile& tile) const {
    const ForwardParams<float>& p = a_.params;
    if (p.pattern.hard) return p.pattern.causal ? static_cast<float>(tile.last - cursor_.blocks().run.begin) : 0.0f;
    const int64_t row = (tile.sequence.batch * p.groups + tile.group) * p.queries + tile.sequence.query_begin;
    return fminf(p.threshold[row + tile.last - tile.shift], FLT_MAX);
  }

  // Starts the loads of a unit's slots; what they bring is looked at when its rows are loaded.
  __device__ void look_up(int32_t unit) {
    const TileBlocks& blocks = cursor_.blocks();
    last_key_ = -1;
    lowest_ = -INFINITY;
    copied_ = copies_ == nullptr || cursor_.is_window(unit) ? nullptr : copies_ + unit * kUnitBytes<Traits::kWidth>;
    if (cursor_.is_window(unit)) {
      begin_ = cursor_.first_key(unit);
      end_ = min(blocks.last + 1, keys_);
      flags_ = Traits::kPlaced;
      return;
    }
    const RunView& run = blocks.run;
    begin_ = unit * Traits::kSlots;
    end_ = min(begin_ + Traits::kSlots, run.count);
    flags_ = 0;
    const int32_t slot = begin_ + thread_;
    if (run.key != nullptr) {  // lists have room for whole units
      key_ = run.key[slot];
      score_ = run.score[slot];
      if (end_ - begin_ == Traits::kSlots) lowest_ = run.block_score[unit];
    } else {
      key_ = slot;
      score_ = run.score_of(min(slot, run.count - 1));
    }
    if (end_ > run.entering) last_key_ = run.key_of(end_ - 1);
  }

  __device__ void load(bool last) {
    typename Traits::Notes& notes = s_.notes[Traits::note_of(ring_)];
    const int64_t window = a_.params.pattern.window;
    int32_t key = key_, entry = -1;
    float score = score_;
    uint32_t span = kEver;
    if (flags_ & Traits::kPlaced) {
      key = entry = begin_ + thread_;
      score = INFINITY;
      span = static_cast<uint32_t>(window);
    } else if (last_key_ >= 0 && last_key_ + window > cursor_.blocks().first) {
      flags_ |= Traits::kPlaced;
      if (begin_ + thread_ >= cursor_.blocks().run.entering)
        entry = static_cast<int32_t>(min(key + window, int64_t{kNever}));
    } else if (lowest_ > highest_ && lowest_ >= highest_ + 1.0f) {  // both may be -inf
      flags_ |= Traits::kSolid;
    }
    const bool whole = begin_ + Traits::kSlots <= end_;
    if (begin_ + thread_ >= end_) key = -1, score = -INFINITY;
    barrier_wait(s_.key_empty[ring_.place], ring_.phase ^ 1);
    s_.key_rows[thread_] = key;
    typename Traits::Column& column = notes.column[thread_ / 2 % 4];
    column.entry[thread_ / 8 * 2 + thread_ % 2] = entry;
    column.score[thread_ / 8 * 2 + thread_ % 2] = score;
    if (thread_ == 0) {
      notes.flags = flags_ | (last ? Traits::kLast : 0) | (copied_ == nullptr ? Traits::kGathered : 0);
      notes.span = span;
    }
    __syncwarp();
    if (copied_ != nullptr) {
      if (thread_ == 0) bring_unit<Traits::kWidth>(copied_, s_.key[ring_.place], s_.key_full[ring_.place]);
    } else {
      copier_.copy(s_.key_rows + thread_ / 32 * kKeyRows, whole, base_, shared_address(s_.key[ring_.place]));
    }
    barrier_arrive_after_copies(s_.key_full[ring_.place]);
    barrier_arrive_as_warp(s_.key_full[ring_.place], lane_);  // for the notes
    ring_.advance();
  }

  const ForwardArguments& a_;
  typename Traits::Shared& s_;
  static constexpr int kKeyRows = Traits::kSlots / 2;  // of a warp
  static constexpr uint32_t kEver = 1u << 31;          // more positions than there are
  const RowCopier<typename Traits::Element, Traits::kWidth, Traits::kSlots, kKeyRows> copier_;
  const int thread_, lane_;
  UnitCursor cursor_;
  const char* base_;
  const char* copies_;  // of the run's list, or null
  int32_t keys_;
  float highest_;
  // The unit looked up: slots or, in the window, keys [begin_, end_) and beyond.
  int32_t key_;  // of this thread's slot
  float score_;
  int32_t begin_, end_;
  int32_t last_key_;  // of those that enter within the run
  float lowest_;      // score
  uint32_t flags_;
  const char* copied_;  // the unit's copies, or null
  Ring<Traits::kStages> ring_;
};

template <typename Traits>
class ValueProducer {
 public:
  __device__ ValueProducer(const ForwardArguments& a, typename Traits::Shared& shared)
      : a_(a), s_(shared), copier_(a.params.value), lane_(threadIdx.x % 32), cursor_(shared.blocks[2]) {}

  __device__ void run() {
    for_each_tile<Traits>(a_, s_, [&](const QueryTile& tile) { run_tile(tile); });
  }

 private:
  __device__ void run_tile(const QueryTile& tile) {
    cursor_.start(find_blocks(a_.params, a_.plan, tile));
    base_ = a_.params.value.row(tile.sequence.batch, tile.sequence.key_begin, tile.group);
    keys_ = tile.sequence.keys;
    const char* copies = nullptr;
    if constexpr (!Traits::kCareful)
      copies = find_copies<Traits::kWidth>(a_.compact, a_.compact.value, cursor_.blocks().run);
    int32_t unit = cursor_.next(), end = 0;
    for (; copies != nullptr && unit >= 0 && !cursor_.is_window(unit); unit = cursor_.next())
      bring(copies + unit * kUnitBytes<Traits::kWidth>);
    int2 key{};
    if (unit >= 0) key = look_up(unit, end);
    while (unit >= 0) {
      const int2 mine = key;
      const int32_t mine_end = end;
      unit = cursor_.next();
      if (unit >= 0) key = look_up(unit, end);
      load(mine, mine_end);
    }
  }

  // `end`: how many of the unit's slots there are.
  __device__ int2 look_up(int32_t unit, int32_t& end) const {
    const TileBlocks& blocks = cursor_.blocks();
    const RunView& run = blocks.run;
    const bool window = cursor_.is_window(unit);
    const int32_t begin = window ? cursor_.first_key(unit) : unit * Traits::kSlots;
    end = min((window ? min(blocks.last + 1, keys_) : run.count) - begin, Traits::kSlots);
    const int32_t slot = begin + 2 * lane_;
    if (!window && run.key != nullptr) return *reinterpret_cast<const int2*>(run.key + slot);
    return {slot, slot + 1};
  }

  __device__ void bring(const char* copied) {
    barrier_wait(s_.value_empty[ring_.place], ring_.phase ^ 1);
    if (lane_ == 0) bring_unit<Traits::kWidth>(copied, s_.value[ring_.place], s_.value_full[ring_.place]);
    __syncwarp();
    barrier_arrive(s_.value_full[ring_.place]);
    ring_.advance();
  }

  __device__ void load(int2 key, int32_t end) {
    const int local = 2 * lane_;
    if (local >= end) key.x = -1;
    if (local + 1 >= end) key.y = -1;
    barrier_wait(s_.value_empty[ring_.place], ring_.phase ^ 1);
    *reinterpret_cast<int2*>(&s_.value_rows[local]) = key;
    __syncwarp();
    copier_.copy(s_.value_rows, end == Traits::kSlots, base_, shared_address(s_.value[ring_.place]));
    if constexpr (Traits::kCareful) {
      for (int i = 0; i < 2; ++i) s_.poisoned[ring_.place][local + i] = 0;
      __syncwarp();
      copier_.clean(shared_address(s_.value[ring_.place]), s_.poisoned[ring_.place]);
    }
    barrier_arrive_after_copies(s_.value_full[ring_.place]);
    __syncwarp();  // value_rows is free again
    ring_.advance();
  }

  const ForwardArguments& a_;
  typename Traits::Shared& s_;
  const RowCopier<typename Traits::Element, Traits::kWidth, Traits::kSlots, Traits::kSlots> copier_;
  const int lane_;
  UnitCursor cursor_;
  const char* base_;
  int32_t keys_;
  Ring<Traits::kStages> ring_;
};

// Takes tiles, and brings their queries with what else the consumers must know of them.
template <typename Traits>
class QueryProducer {
 public:
  __device__ QueryProducer(const ForwardArguments& a, typename Traits::Shared& shared)
      : a_(a), s_(shared), lane_(threadIdx.x % 32), next_(blockIdx.x) {}

  __device__ void run() {
    while (true) {
      // Only now: who is late must not have taken what others could do.
      barrier_wait(s_.query_empty[ring_.place], ring_.phase ^ 1);
      const int64_t number = take();
      if (number >= a_.work) break;
      const NumberedTile found = find_tile<Traits>(a_, number);
      const QueryTile& tile = found.tile;
      if (tile.last < tile.first) continue;
      announce(number);
      if (lane_ == 0) s_.place[ring_.place] = found.place;
      load(tile, see_keys(tile) ? Traits::kKeys : Traits::kNoKeys);
    }
    announce(-1);
    if (lane_ == 0) s_.message[ring_.place] = Traits::kDone;
    tell();
  }

 private:
  // The next tile's number, or one past the last. In the careful pass, which has few tiles, each CTA has its own.
  __device__ int64_t take() {
    if constexpr (Traits::kCareful) {
      while (next_ < a_.work && !is_suspect<Traits>(a_, next_)) next_ += gridDim.x;
      const int64_t number = next_;
      next_ += gridDim.x;
      return number;
    }
    unsigned long long number = 0;
    if (lane_ == 0) number = atomicAdd(reinterpret_cast<unsigned long long*>(a_.taken), 1ull);
    return static_cast<int64_t>(__shfl_sync(~0u, number, 0));
  }

  __device__ void announce(int64_t number) const {
    if (lane_ == 0) s_.number[ring_.place] = number;
    barrier_arrive_as_warp(s_.number_full[ring_.place], lane_);
  }

  __device__ bool see_keys(const QueryTile& tile) const {
    if (!tile.has_keys()) return false;
    UnitCursor cursor(s_.blocks[3]);
    cursor.start(find_blocks(a_.params, a_.plan, tile));
    return cursor.next() >= 0;
  }

  __device__ void load(const QueryTile& tile, typename Traits::Message message) {
    typename Traits::Row* rows = s_.rows[ring_.place];
    for (int r = lane_; r < Traits::kRows; r += 32) rows[r] = describe(tile, r);
    if (lane_ == 0) s_.message[ring_.place] = message;
    __syncwarp();
    if (message == Traits::kKeys) copy(rows);
    tell();
    ring_.advance();
  }

  __device__ typename Traits::Row describe(const QueryTile& tile, int r) const {
    const ForwardParams<float>& p = a_.params;
    if (!tile.exists(r)) return {nullptr, nullptr, nullptr, 0.0f, 0};
    const int64_t batch = tile.sequence.batch, query = tile.query(r), head = tile.query_head(r);
    const int32_t position = tile.causal ? tile.position(r) : 0;
    return {p.query.row(batch, query, head), p.out.row(batch, query, head),
            p.lse + (batch * p.groups * p.heads_per_group + head) * p.queries + query,
            gate_threshold(tile, query, position), position};
  }

  // What a gate is compared with, for the query in row `query` of the batch entry.
  __device__ float gate_threshold(const QueryTile& tile, int64_t query, int32_t position) const {
    const ForwardParams<float>& p = a_.params;
    const float threshold = p.threshold[(tile.sequence.batch * p.groups + tile.group) * p.queries + query];
    if (threshold != threshold) return threshold;
    if (!p.pattern.hard) return fminf(threshold, FLT_MAX);  // pinned keys, of score +inf, stay above it
    if (!p.pattern.causal) return 0.0f;
    return static_cast<float>(position % static_cast<int32_t>(a_.plan.runs.size));
  }

  __device__ void copy(const typename Traits::Row* rows) const {
    constexpr int kChunks = Traits::kWidth / 8, kRowsOfLane = Traits::kRows / (32 / kChunks);
    const int chunk = lane_ % kChunks, first = lane_ / kChunks * kRowsOfLane;
    const uint32_t column = shared_address(s_.query[ring_.place]) + chunk / 8 * (Traits::kRows * 128) + first * 128;
    const bool inside = chunk * 8 < a_.params.query.width;
#pragma unroll 8
    for (int i = 0; i < kRowsOfLane; ++i) {
      const char* source = rows[first + i].source;
      const bool read = inside && source != nullptr;
      copy_async_16(column + i * 128 + ((chunk ^ i) % 8) * 16, source + chunk * 16, read);
    }
  }

  // Tells the consumers once the copies are done, and now of ordinary writes.
  __device__ void tell() const {
    barrier_arrive_after_copies(s_.query_full[ring_.place]);
    barrier_arrive_as_warp(s_.query_full[ring_.place], lane_);
  }

  const ForwardArguments& a_;
  typename Traits::Shared& s_;
  const int lane_;
  int64_t next_;  // of the careful pass
  Ring<Traits::kQueryStages> ring_;
};

}  // namespace sparsek::cuda::sm90
