// Thresholds, or k-th highest levels, after every key: bounds at the starts of chunks first, one chunk after the other,
// then all tiles of all chunks at once.
#include <algorithm>

#include "cuda/common/launch.cuh"
#include "cuda/selection/gates.cuh"
#include "cuda/selection/group.cuh"
#include "cuda/selection/params.h"
#include "cuda/selection/run.cuh"
#include "cuda/selection/sorted.cuh"

namespace sparsek::cuda {
namespace {

constexpr int kWalkThreads = 512;  // of find_survivors
constexpr int kTileThreads = 256;  // of solve_tiles
constexpr int kWarps = kTileThreads / kWarpSize;

// Keys of a tile: many small ones keep a GPU busy, fewer large ones look at fewer keys.
constexpr int kSmallTile = 512, kLargeTile = 1024;
constexpr int64_t kManyTiles = 2048;  // small ones

template <typename Gate>
constexpr int kChunkOf = kChunk<typename Gate::Score, Gate::kHard>;
template <typename Gate>
constexpr int kMaxSurvivorsOf = kMaxSurvivors<typename Gate::Score, Gate::kHard>;
template <typename Gate>
constexpr int64_t kCapacity = kMaxSurvivorsOf<Gate> + kChunkOf<Gate>;  // keys that a list may hold
template <typename Gate>
using Params = LevelParams<typename Gate::Score, Gate::kHard>;

// One sequence and key/value head.
template <typename Gate>
struct Column {
  const typename Gate::Score* scores;  // [keys]
  typename Gate::Level* after_key;     // [keys]
  int64_t first_start;                 // index of the start of chunk 1, in [chunk starts, G]
  int64_t start_stride;
  int32_t candidates;  // keys that are one for some position

  __device__ Column(const Params<Gate>& params, int64_t s, int64_t group) {
    const Sequence sequence = params.sequences.at(s);
    const int64_t offset = (sequence.batch * params.groups + group) * params.sequences.keys + sequence.key_begin;
    scores = params.table + offset;
    after_key = params.after_key + offset;
    const Items chunks{kChunkOf<Gate>, 0};
    first_start = params.sequences.first_item(params.sequences.cu_k, params.sequences.keys, chunks, s) * params.groups;
    first_start += group;
    start_stride = params.groups;
    const int64_t left = sequence.keys - (params.pattern.causal ? params.pattern.window : 0);
    candidates = static_cast<int32_t>(left > 0 ? left : 0);
  }

  // Of chunk `chunk` > 0.
  __device__ int64_t start(int32_t chunk) const { return first_start + (chunk - 1) * start_stride; }
};

// Survivors of every chunk start: a superset of the keys that are kept from there on.
template <typename Gate>
__global__ void __launch_bounds__(kWalkThreads) find_survivors(Params<Gate> params) {
  using Block = BlockGroup<kWalkThreads>;
  using Level = typename Gate::Level;
  using Real = typename Gate::Real;
  constexpr int kLength = kChunkOf<Gate>, kRoom = kMaxSurvivorsOf<Gate>;
  extern __shared__ __align__(16) char memory[];
  __shared__ __align__(16) char scratch[Block::kScratch];
  Level* const list = reinterpret_cast<Level*>(memory);  // [kRoom + kLength]
  Block block{static_cast<int>(threadIdx.x), scratch};
  const int64_t s = divide(blockIdx.x, params.groups);
  const Column<Gate> column(params, s, blockIdx.x - s * params.groups);

  Level lower = Gate::kLowest;
  int32_t count = 0;
  bool listed = true;  // else all keys so far stand for the survivors
  for (int32_t chunk = 1; static_cast<int64_t>(chunk) * kLength < column.candidates; ++chunk) {
    const int32_t end = chunk * kLength;
    const auto survives = [&](Level key) { return key > lower; };
    if (listed) {
      const auto load = [&](int i) { return Gate::level(column.scores[end - kLength + i], end - kLength + i); };
      count += compact(block, kLength, load, survives, list + count, kLength);
    } else {
      count = end;
    }
    const auto keys = listed ? Keys<Gate>::of_levels(list) : Keys<Gate>::of_scores(column.scores);

    Survey<Gate> survey;
#pragma unroll 1
    for (int32_t i = block.rank; i < count; i += Block::kSize) survey.visit(keys[i], lower);
    survey.reduce(block);
    if (survey.pinned >= params.num_keys) {
      lower = Gate::kHighest;
    } else if (survey.count > 0 && is_bounded<Gate>(lower, survey.count, params.num_keys)) {
      if (lower == Gate::kLowest) lower = Gate::below(survey.lowest);
      const Real num_keys = static_cast<Real>(params.num_keys);
      const auto accuracy = Accuracy<Real>::of(num_keys, count, Block::kSize, 1 + num_keys / 64);
      const auto masses = [&](Level at, Level) {
        MassPair<Real> mass;
#pragma unroll 2
        for (int32_t i = block.rank; i < count; i += Block::kSize) Gate::add(keys[i], at, mass.first);
        mass.sum(block, accuracy);
        return mass;
      };
      Level upper = survey.highest;
      narrow<Gate>(masses, Gate::budget(params.num_keys), accuracy, true, false, lower, lower, upper);
    }

    // Shortens the list, or starts it afresh.
    const int32_t survivors = compact(block, count, [&](int i) { return keys[i]; }, survives, list, kRoom);
    const int64_t start = column.start(chunk);
    listed = survivors <= kRoom;
    count = listed ? survivors : 0;
    if (block.rank == 0) {
      params.lower[start] = lower;
      params.survivor_count[start] = listed ? count : Params<Gate>::kUncounted;
    }
    for (int32_t i = block.rank; i < count; i += Block::kSize) params.survivors[start * kRoom + i] = list[i];
  }
}

// Where tiles may be solved by sorting.
template <typename Gate>
constexpr bool kSorts = std::is_same_v<Gate, SoftGate<float>>;

// Shared memory of a tile.
template <typename Gate, int kTile>
struct TileMemory {
  static constexpr int kSteps = kTile / kWarpSize;
  static_assert(kSteps <= kWarpSize);
  using Level = typename Gate::Level;
  static constexpr int kScratch = BlockGroup<kTileThreads>::kScratch;
  using Nearby = NearbyMemory<Gate>;
  using Sorted = SortedMemory<2 * kTile>;
  Nearby* nearby;         // [kWarps]
  char* scratch;          // of the block
  uint32_t* step_counts;  // [kSteps] keys above Tile::lower, later: above Tile::low
  Level* results;         // [kTile + 1]
  Level* list;            // [keys that survive or follow in the chunk]

  __device__ explicit TileMemory(char* memory)
      : nearby(reinterpret_cast<Nearby*>(memory)),
        scratch(reinterpret_cast<char*>(nearby + kWarps)),
        step_counts(reinterpret_cast<uint32_t*>(scratch + kScratch)),
        results(reinterpret_cast<Level*>(step_counts + kSteps)),
        list(results + kTile + 1) {}

  // Past the first `listed` keys; null where there is no room.
  __device__ Sorted* sorted(int32_t listed, int64_t keys) const {
    const auto place = reinterpret_cast<uintptr_t>(list + listed) + alignof(Sorted) - 1;
    auto* const sorted = reinterpret_cast<Sorted*>(place / alignof(Sorted) * alignof(Sorted));
    return reinterpret_cast<Level*>(sorted + 1) <= list + room(keys) ? sorted : nullptr;
  }

  // Of the list, where sequences have no more than `keys` keys.
  __host__ __device__ static int64_t room(int64_t keys) {
    constexpr int64_t kToSort = 3 * kTile + sizeof(Sorted) / sizeof(Level) + 1;
    const int64_t listed = keys < kCapacity<Gate> ? keys : kCapacity<Gate>;
    return kSorts<Gate> && keys > kTile && listed < kToSort ? kToSort : listed;
  }
  static int64_t bytes(int64_t keys) {
    return kWarps * sizeof(Nearby) + kScratch + kSteps * sizeof(uint32_t) + (kTile + 1 + room(keys)) * sizeof(Level);
  }
};

template <typename Gate, int kTile>
__global__ void __launch_bounds__(kTileThreads, 3) solve_tiles(Params<Gate> params) {
  using Block = BlockGroup<kTileThreads>;
  using Level = typename Gate::Level;
  using Real = typename Gate::Real;
  using Settled = typename Gate::Settled;
  constexpr int kLength = kChunkOf<Gate>, kRoom = kMaxSurvivorsOf<Gate>;
  static_assert(kLength % kTile == 0);
  extern __shared__ __align__(16) char memory[];
  constexpr int kSteps = kTile / kWarpSize;
  constexpr Items kTiles{kTile, 1};
  const TileMemory<Gate, kTile> shared(memory);
  Block block{static_cast<int>(threadIdx.x), shared.scratch};
  uint32_t* const step_counts = shared.step_counts;

  const int64_t item = divide(blockIdx.x, params.groups), group = blockIdx.x - item * params.groups;
  const Sequences& sequences = params.sequences;
  const bool causal = params.pattern.causal;
  const int64_t s = causal ? sequences.find(sequences.cu_k, sequences.keys, kTiles, item) : item;
  const Column<Gate> column(params, s, group);
  const int64_t first =
      causal ? (item - sequences.first_item(sequences.cu_k, sequences.keys, kTiles, s)) * kTile : column.candidates - 1;
  if (first < 0 || first >= column.candidates) return;
  const int32_t begin = static_cast<int32_t>(first), count = min(kTile, column.candidates - begin);
  const auto write_all = [&](Level result) {
    for (int i = block.rank; i < count; i += Block::kSize) column.after_key[begin + i] = result;
  };

  // Survivors of the chunk's start, and what followed in the chunk.
  Tile<Gate> tile;
  tile.num_keys = params.num_keys;
  tile.lower = Gate::kLowest;
  int32_t old = 0;  // keys from before the tile
  const int32_t chunk = begin / kLength, chunk_begin = chunk * kLength;
  if (chunk > 0) {
    const int64_t start = column.start(chunk);
    tile.lower = params.lower[start];
    old = params.survivor_count[start];
#pragma unroll 2
    for (int32_t i = block.rank; i < old; i += Block::kSize) shared.list[i] = params.survivors[start * kRoom + i];
  }
  if (tile.lower == Gate::kHighest) return write_all(Gate::kHighest);
  const bool listed = old != Params<Gate>::kUncounted;
  const auto survives = [&](Level key) { return key > tile.lower; };
  const auto load = [&](int i) { return Gate::level(column.scores[chunk_begin + i], chunk_begin + i); };
  if (listed) {
    tile.keys = Keys<Gate>::of_levels(shared.list);
    old += compact(block, begin - chunk_begin, load, survives, shared.list + old, kLength);
  } else {
    tile.keys = Keys<Gate>::of_scores(column.scores);
    old = begin;
  }

  // The tile's own keys, a warp's worth at a time.
  const auto own_key = [&](int step) {
    const int i = step * kWarpSize + block.lane();
    return i < count ? load(begin - chunk_begin + i) : Gate::kLowest;
  };
  Survey<Gate> survey_own;
#pragma unroll 1
  for (int step = block.warp(); step < kSteps; step += kWarps) {
    const Level key = own_key(step);
    survey_own.visit(key, tile.lower);
    const int num_surviving = __popc(__ballot_sync(kAllLanes, survives(key)));
    if (block.lane() == 0) step_counts[step] = num_surviving;
  }

  Survey<Gate> survey;
#pragma unroll 1
  for (int32_t i = block.rank; i < old; i += Block::kSize) survey.visit(tile.keys[i], tile.lower);
  const Survey<Gate> survey_old = survey.reduce_counts(block);
  survey.add(survey_own);
  survey.reduce(block);
  if (survey_old.pinned >= tile.num_keys) return write_all(Gate::kHighest);
  const bool bounded = is_bounded<Gate>(tile.lower, survey.count, tile.num_keys);
  if (!bounded && survey.pinned < tile.num_keys) return write_all(Gate::kLowest);
  // Keys of steps before `step` that step_counts counts.
  const auto counted_before = [&](int step) {
    return static_cast<int32_t>(
        __reduce_add_sync(kAllLanes, block.lane() < min(step, kSteps) ? step_counts[block.lane()] : 0));
  };
  const auto list_own = [&](Level* list, const auto& keep) {
#pragma unroll 1
    for (int step = block.warp(); step < kSteps; step += kWarps) {
      const Level key = own_key(step);
      const unsigned mask = __ballot_sync(kAllLanes, keep(key));
      const int before = counted_before(step);
      if (keep(key)) list[before + __popc(mask & lanes_before(block.lane()))] = key;
    }
  };
  if (listed) list_own(shared.list + old, survives);
  __syncthreads();

  tile.low = tile.lower > Gate::kLowest ? tile.lower : Gate::below(survey.lowest);
  tile.high = survey.highest;
  tile.settled = Settled::none(tile.low);
  const int32_t end = old + (listed ? survey.count - survey_old.count : count);
  const Real num_keys = static_cast<Real>(tile.num_keys);
  const auto accuracy = Accuracy<Real>::of(num_keys, end, Block::kSize, 1 + num_keys / 64);
  const auto masses = [&](Level at_low, Level at_high) {
    return tile.masses(block, old, end, at_low, at_high, accuracy);
  };
  narrow<Gate>(masses, Gate::budget(tile.num_keys), accuracy,
               is_bounded<Gate>(tile.lower, survey_old.count, tile.num_keys), survey.pinned < tile.num_keys, tile.low,
               tile.low, tile.high);

  // Keys active between these bounds. Where there are too many, which takes a sequence that is its own list, all count.
  Settled settled = Settled::none(tile.low);
  const auto is_active = [&](Level old_key) {
    const State state = Gate::state(old_key, tile.low, tile.high);
    settled.count(old_key, state);
    return state == State::kActive;
  };
  const int32_t room = listed ? old : kRoom + kLength - kTile;
  const int32_t active = compact(block, old, [&](int i) { return tile.keys[i]; }, is_active, shared.list, room);
  const bool shortened = active <= room;

  // Results change where a key enters, and no key does that is not above all of them. Before there are more than k
  // candidates each one counts: Tile::low is below them all.
  const auto enters = [&](Level key) { return key > tile.low; };
  int32_t entering = count;  // else every key does, for simplicity
  bool rises = true;         // its keys seem to arrive saturated: levels are guessed to rise evenly
  if (shortened) {
#pragma unroll 1
    for (int step = block.warp(); step < kSteps; step += kWarps) {
      const Level key = own_key(step);
      const int num_entering = __popc(__ballot_sync(kAllLanes, enters(key)));
      if (block.lane() == 0) step_counts[step] = num_entering;
      if constexpr (kSorts<Gate>)
        rises &= !enters(key) || key - Gate::between(tile.low, tile.high, step / static_cast<float>(kSteps)) >= 1;
    }
    settled.reduce(block);
    tile.settled = settled;
    tile.keys = Keys<Gate>::of_levels(shared.list);
    old = active;
    __syncthreads();
    entering = counted_before(kSteps);
    list_own(shared.list + old, enters);
  }
  rises = __syncthreads_and(rises);

  // Result e is that after `e` keys have entered. Number 0 is not needed if the first key does.
  const int first_result = !shortened || enters(load(begin - chunk_begin)) ? 1 : 0;
  const int num_results = entering + 1 - first_result;
  bool solved = false;
  if constexpr (kSorts<Gate>) {
    auto* const sorted = shared.sorted(old + entering, sequences.keys);
    if (rises && shortened && num_results > kTileThreads && survey.pinned < tile.num_keys && sorted != nullptr)
      solved = solve_sorted(block, tile, {old, entering, first_result, survey_old.count}, *sorted, shared.results);
  }
#pragma unroll 1
  for (int run = block.warp(); !solved && run * kWarpSize < num_results; run += kWarps) {
    const int before = run * kWarpSize;  // keys that have entered before those of this run
    Run<Gate> own;
    own.share = (before + kWarpSize / 2) / static_cast<float>(num_results);
    own.has_result = before + block.lane() < num_results;
    own.first = old + before;
    own.count = min(kWarpSize - 1 + first_result, entering - before);
    own.mine = min(block.lane() + first_result, own.count);
    own.pinned_before = own.pinned = survey_old.pinned;
    if (survey.pinned > survey_old.pinned) {
      for (int32_t i = 0; i < before + own.mine; ++i) {
        const int pinned = tile.keys[old + i] == Gate::kHighest ? 1 : 0;
        own.pinned += pinned;
        own.pinned_before += i < before ? pinned : 0;
      }
    }
    if (shortened) {
      own.candidates_before = survey_old.count + before;
      own.candidates = own.candidates_before + own.mine;
    } else {
      const unsigned mask = __ballot_sync(kAllLanes, survives(own_key(run)));
      own.candidates_before = survey_old.count + counted_before(run);
      own.candidates = own.candidates_before + __popc(mask & (lanes_before(block.lane()) | 1u << block.lane()));
    }
    own.nearby = shared.nearby + block.warp();
    const Level result = solve_run<Gate>(tile, own);
    if (own.has_result) shared.results[before + first_result + block.lane()] = result;
    __syncwarp();
  }
  __syncthreads();
#pragma unroll 1
  for (int step = block.warp(); step < kSteps; step += kWarps) {
    const int i = step * kWarpSize + block.lane();
    const unsigned mask = __ballot_sync(kAllLanes, enters(own_key(step)));
    const unsigned up_to_own = lanes_before(block.lane()) | 1u << block.lane();
    const int entered = shortened ? counted_before(step) + __popc(mask & up_to_own) : i + 1;
    if (i < count) column.after_key[begin + i] = shared.results[entered];
  }
}

template <typename Gate, int kTile>
void launch_tiles(const Params<Gate>& params, int64_t tiles, cudaStream_t stream) {
  launch("solve_tiles", solve_tiles<Gate, kTile>, tiles, kTileThreads,
         TileMemory<Gate, kTile>::bytes(params.sequences.keys), stream, params);
}

template <typename Gate>
void find_levels(const Params<Gate>& params, cudaStream_t stream) {
  const Sequences& sequences = params.sequences;
  const int64_t columns = sequences.count * params.groups;
  if (columns == 0 || sequences.keys == 0) return;
  if (sequences.keys > kChunkOf<Gate>) {
    launch("find_survivors", find_survivors<Gate>, columns, kWalkThreads,
           kCapacity<Gate> * sizeof(typename Gate::Level), stream, params);
  }
  if (!params.pattern.causal) return launch_tiles<Gate, kSmallTile>(params, columns, stream);
  const auto tiles = [&](int64_t size) {
    return sequences.num_items(sequences.cu_k, sequences.keys, {size, 1}) * params.groups;
  };
  const int64_t packed = sequences.cu_k == nullptr ? 1 : sequences.count;
  if (tiles(kSmallTile) > kManyTiles && sequences.keys > kLargeTile * packed) {
    launch_tiles<Gate, kLargeTile>(params, tiles(kLargeTile), stream);
  } else {
    launch_tiles<Gate, kSmallTile>(params, tiles(kSmallTile), stream);
  }
}

}  // namespace

template <typename T, bool kHard>
void launch_levels(const LevelParams<T, kHard>& params, cudaStream_t stream) {
  if constexpr (kHard) {
    find_levels<HardGate<T>>(params, stream);
  } else {
    find_levels<SoftGate<T>>(params, stream);
  }
}

template void launch_levels(const LevelParams<float, false>&, cudaStream_t);
template void launch_levels(const LevelParams<float, true>&, cudaStream_t);
template void launch_levels(const LevelParams<double, false>&, cudaStream_t);
template void launch_levels(const LevelParams<double, true>&, cudaStream_t);

}  // namespace sparsek::cuda
