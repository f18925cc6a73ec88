// The producer: finds the units of each tile and gathers their rows into shared memory. One warp brings keys, one
// values, and two queries, each at its own pace.
#pragma once

#include <cfloat>

#include "cuda/plan/tile.cuh"
#include "cuda/sm90/forward/traits.cuh"
#include "cuda/sm90/ptx.cuh"
#include "cuda/sm90/units.cuh"

namespace sparsek::cuda::sm90 {

// Calls visit(tile, its number) for each tile of this CTA that has queries.
template <typename Traits, typename Visit>
__device__ void for_each_tile(const ForwardArguments& a, const Visit& visit) {
  for (int64_t index = blockIdx.x; index < a.work; index += gridDim.x) {
    if (Traits::kCareful && a.suspects[index] == 0) continue;
    // Tiles of one head are neighbours, so that its keys stay in the L2 cache; long ones come first.
    const int64_t pack = divide(index, a.num_tiles), item = (pack + 1) * a.num_tiles - 1 - index;
    const QueryTile tile = find_query_tile(a.params, a.tiles, item, pack * a.heads, a.heads);
    if (tile.last >= tile.first) visit(tile, index);
  }
}

// A lane's two slots of a unit.
struct Slots {
  int2 key;
  float2 score;
};

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
    for_each_tile<Traits>(a_, [&](const QueryTile& tile, int64_t) {
      if (tile.has_keys()) run_tile(tile);
    });
  }

 private:
  __device__ void run_tile(const QueryTile& tile) {
    cursor_.start(find_blocks(a_.params, a_.plan, tile));
    base_ = a_.params.key.row(tile.sequence.batch, tile.sequence.key_begin, tile.group);
    keys_ = tile.sequence.keys;
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
    if (cursor_.is_window(unit)) {
      begin_ = cursor_.first_key(unit);
      end_ = min(blocks.last + 1, keys_);
      flags_ = Traits::kWindow;
      return;
    }
    const RunView& run = blocks.run;
    begin_ = unit * Traits::kSlots;
    end_ = min(begin_ + Traits::kSlots, run.count);
    flags_ = 0;
    const int32_t slot = begin_ + 2 * thread_;
    if (run.key != nullptr) {  // lists have room for whole units
      slots_.key = *reinterpret_cast<const int2*>(run.key + slot);
      slots_.score = *reinterpret_cast<const float2*>(run.score + slot);
      if (end_ - begin_ == Traits::kSlots) lowest_ = fminf(run.block_score[2 * unit], run.block_score[2 * unit + 1]);
    } else {
      slots_.key = {slot, slot + 1};
      const int32_t most = run.count - 1;
      slots_.score = {run.score_of(min(slot, most)), run.score_of(min(slot + 1, most))};
    }
    if (end_ > run.entering) last_key_ = run.key_of(end_ - 1);
  }

  __device__ void load(bool last) {
    typename Traits::Notes& notes = s_.notes[note_];
    const int local = 2 * thread_;
    const int64_t window = a_.params.pattern.window;
    int2 key = slots_.key, entry{-1, -1};
    float2 score = slots_.score;
    if (flags_ & Traits::kWindow) {
      key = entry = {begin_ + local, begin_ + local + 1};
    } else if (last_key_ >= 0 && last_key_ + window > cursor_.blocks().first) {
      flags_ |= Traits::kEntering;
      const int32_t entering = cursor_.blocks().run.entering - begin_ - local;
      const auto entry_of = [&](int i, int32_t key) {
        return i >= entering ? static_cast<int32_t>(min(key + window, int64_t{kNever})) : -1;
      };
      entry = {entry_of(0, key.x), entry_of(1, key.y)};
    } else if (lowest_ > highest_) {
      flags_ |= lowest_ >= highest_ + 1.0f ? Traits::kSolid : Traits::kSeen;
    }
    const bool whole = begin_ + Traits::kSlots <= end_;
    if (!whole) {
      const int32_t count = end_ - begin_ - local;
      if (count < 1) key.x = -1, score.x = -INFINITY;
      if (count < 2) key.y = -1, score.y = -INFINITY;
    }
    barrier_wait(s_.key_empty[stage_], phase_ ^ 1);
    *reinterpret_cast<int2*>(&s_.key_rows[local]) = key;
    *reinterpret_cast<int2*>(&notes.entry[local]) = entry;
    *reinterpret_cast<float2*>(&notes.score[local]) = score;
    if (thread_ == 0) notes.flags = flags_ | (last ? Traits::kLast : 0);
    __syncwarp();
    copier_.copy(s_.key_rows + thread_ / 32 * 64, whole, base_, shared_address(s_.key[stage_]));
    barrier_arrive_after_copies(s_.key_full[stage_]);
    __syncwarp();
    if (lane_ == 0) barrier_arrive(s_.key_full[stage_]);  // for the notes
    note_ = (note_ + 1) % Traits::kNotes;
    if (++stage_ == Traits::kStages) stage_ = 0, phase_ ^= 1;
  }

  const ForwardArguments& a_;
  typename Traits::Shared& s_;
  const RowCopier<Traits, Traits::kWidth, 64> copier_;
  const int thread_, lane_;
  UnitCursor cursor_;
  const char* base_;
  int32_t keys_;
  float highest_;
  // The unit looked up: slots or, in the window, keys [begin_, end_) and beyond.
  Slots slots_;
  int32_t begin_, end_;
  int32_t last_key_;  // of those that enter within the run
  float lowest_;      // score
  uint32_t flags_;
  int note_ = 0, stage_ = 0;
  uint32_t phase_ = 0;
};

template <typename Traits>
class ValueProducer {
 public:
  __device__ ValueProducer(const ForwardArguments& a, typename Traits::Shared& shared)
      : a_(a), s_(shared), copier_(a.params.value), lane_(threadIdx.x % 32), cursor_(shared.blocks[2]) {}

  __device__ void run() {
    for_each_tile<Traits>(a_, [&](const QueryTile& tile, int64_t) {
      if (tile.has_keys()) run_tile(tile);
    });
  }

 private:
  __device__ void run_tile(const QueryTile& tile) {
    cursor_.start(find_blocks(a_.params, a_.plan, tile));
    base_ = a_.params.value.row(tile.sequence.batch, tile.sequence.key_begin, tile.group);
    keys_ = tile.sequence.keys;
    int32_t unit = cursor_.next(), end = 0;
    int4 key{};
    if (unit >= 0) key = look_up(unit, end);
    while (unit >= 0) {
      const int4 mine = key;
      const int32_t mine_end = end;
      unit = cursor_.next();
      if (unit >= 0) key = look_up(unit, end);
      load(mine, mine_end);
    }
  }

  // `end`: how many of the unit's slots there are.
  __device__ int4 look_up(int32_t unit, int32_t& end) const {
    const TileBlocks& blocks = cursor_.blocks();
    const RunView& run = blocks.run;
    const bool window = cursor_.is_window(unit);
    const int32_t begin = window ? cursor_.first_key(unit) : unit * Traits::kSlots;
    end = min((window ? min(blocks.last + 1, keys_) : run.count) - begin, Traits::kSlots);
    const int32_t slot = begin + 4 * lane_;
    if (!window && run.key != nullptr) return *reinterpret_cast<const int4*>(run.key + slot);
    return {slot, slot + 1, slot + 2, slot + 3};
  }

  __device__ void load(int4 key, int32_t end) {
    const int local = 4 * lane_;
    if (local >= end) key.x = -1;
    if (local + 1 >= end) key.y = -1;
    if (local + 2 >= end) key.z = -1;
    if (local + 3 >= end) key.w = -1;
    barrier_wait(s_.value_empty[stage_], phase_ ^ 1);
    *reinterpret_cast<int4*>(&s_.value_rows[local]) = key;
    __syncwarp();
    copier_.copy(s_.value_rows, end == Traits::kSlots, base_, shared_address(s_.value[stage_]));
    if constexpr (Traits::kCareful) {
      for (int i = 0; i < 4; ++i) s_.poisoned[stage_][local + i] = 0;
      __syncwarp();
      copier_.clean(shared_address(s_.value[stage_]), s_.poisoned[stage_]);
    }
    barrier_arrive_after_copies(s_.value_full[stage_]);
    __syncwarp();  // value_rows is free again
    if (++stage_ == Traits::kStages) stage_ = 0, phase_ ^= 1;
  }

  const ForwardArguments& a_;
  typename Traits::Shared& s_;
  const RowCopier<Traits, Traits::kValueWidth, Traits::kSlots> copier_;
  const int lane_;
  UnitCursor cursor_;
  const char* base_;
  int32_t keys_;
  int stage_ = 0;
  uint32_t phase_ = 0;
};

// Brings the queries of a tile, with what else the consumers must know of them.
template <typename Traits>
class QueryProducer {
 public:
  __device__ QueryProducer(const ForwardArguments& a, typename Traits::Shared& shared)
      : a_(a), s_(shared), lane_(threadIdx.x % 32) {}

  __device__ void run() {
    for_each_tile<Traits>(a_, [&](const QueryTile& tile, int64_t work) {
      bool has_keys = tile.has_keys();
      if (has_keys) {
        UnitCursor cursor(s_.blocks[3]);
        cursor.start(find_blocks(a_.params, a_.plan, tile));
        has_keys = cursor.next() >= 0;
      }
      load(tile, has_keys ? Traits::kKeys : Traits::kNoKeys, work);
    });
    barrier_wait(s_.query_empty, phase_ ^ 1);
    if (lane_ == 0) s_.message = Traits::kDone;
    tell();
  }

 private:
  __device__ void load(const QueryTile& tile, typename Traits::Message message, int64_t work) {
    // Ahead of the consumers, who are done with the tile before the last one when the last one's queries were loaded.
    typename Traits::Row* rows = s_.rows[place_];
    for (int r = lane_; r < Traits::kRows; r += 32) rows[r] = describe(tile, r);
    if (lane_ == 0) s_.work[place_] = work;
    __syncwarp();
    barrier_wait(s_.query_empty, phase_ ^ 1);
    if (lane_ == 0) s_.message = message;
    if (message == Traits::kKeys) copy(rows);
    tell();
    phase_ ^= 1;
    if (++place_ == Traits::kRowPlaces) place_ = 0;
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
    const uint32_t column = shared_address(s_.query) + chunk / 8 * (Traits::kRows * 128) + first * 128;
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
    barrier_arrive_after_copies(s_.query_full);
    __syncwarp();
    if (lane_ == 0) barrier_arrive(s_.query_full);
  }

  const ForwardArguments& a_;
  typename Traits::Shared& s_;
  const int lane_;
  int place_ = 0;
  uint32_t phase_ = 0;
};

}  // namespace sparsek::cuda::sm90
