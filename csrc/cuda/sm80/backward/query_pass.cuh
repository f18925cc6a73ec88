// Gradients of the queries: a CTA for each tile of rows goes through the blocks of keys that the tile reads.
#pragma once

#include <type_traits>

#include "cuda/common/launch.cuh"
#include "cuda/plan/tile.cuh"
#include "cuda/sm80/backward/gates.cuh"
#include "cuda/sm80/backward/launch.h"
#include "cuda/sm80/backward/tile.cuh"

namespace sparsek::cuda::sm80 {

constexpr int kQueryPassRing = 3;  // parts whose slots are known at a time

// In shared memory, what all threads have in common: the registers are for the sums.
struct alignas(16) QueryPassState {
  QueryTile tile;
  TileBlocks blocks;
  const char* key;  // of the sequence and the group
  const char* value;
  float last_threshold;          // of the last query
  int32_t open[kQueryPassRing];  // whether all gates of a part are 1
};

template <int W>
struct QueryPass {
  static constexpr int kTiles = W <= 128 ? 2 : 1;  // of 16 rows, per warp
  static constexpr int kRows = 16 * kTiles * kWarps;
  static constexpr int kKeys = 32;  // read together: a part of a block
  static constexpr int kParts = kBlock / kKeys;
  static constexpr int kColumns = kKeys / 8;
  static constexpr int kRing = kQueryPassRing;
  static constexpr int kCtas = 2;

  static constexpr uint32_t kRowTile = kRows * kRowBytes<W>;
  static constexpr uint32_t kKeyTile = kKeys * kRowBytes<W>;

  static constexpr int64_t shared_bytes(int stages, bool hard) {
    return 2 * kRowTile + stages * 2 * kKeyTile + sizeof(QueryPassState) +
           kRing * kKeys * (sizeof(int2) + (hard ? sizeof(float) : 0));
  }
};

struct QueryPassArguments {
  float* gate_sums;  // [B, H, Mq]
  int32_t heads;     // that share a tile
  int32_t stages;
  Items tiles;
  int64_t num_tiles;  // per pack of heads
};

// Enumerates the parts of a tile's blocks; every warp for itself.
template <int kKeys>
class PartCursor {
 public:
  static constexpr int kParts = kBlock / kKeys;

  __device__ explicit PartCursor(const TileBlocks& blocks) : blocks_(blocks) {}

  // The first part from `part` on that is to be read, or -1.
  __device__ int32_t next(int32_t part) {
    const int32_t lists = blocks_.lists * kParts;
    while (part < lists) {
      if (part * kKeys >= blocks_.run.count) {
        part = lists;
        break;
      }
      const int32_t block = part / kParts;
      if (block < base_ || block - base_ >= 32) {
        base_ = block;
        const int32_t mine = block + lane_id();
        live_ = __ballot_sync(~0u, mine < blocks_.lists && blocks_.is_live(mine));
      }
      const uint32_t live = live_ >> (block - base_);
      if (live & 1) return part;
      part = live == 0 ? min(kParts * (base_ + 32), lists) : kParts * (block + __ffs(live) - 1);
    }
    part = max(part, lists);
    return part < blocks_.end * kParts && first_window_key(part) <= blocks_.last ? part : -1;
  }

  __device__ bool is_window(int32_t part) const { return blocks_.is_window(part / kParts); }
  __device__ int32_t first_window_key(int32_t part) const {
    return blocks_.window_key + (part - blocks_.lists * kParts) * kKeys;
  }

 private:
  const TileBlocks& blocks_;
  int32_t base_ = -32;  // blocks whose liveness is known, from here on
  uint32_t live_ = 0;
};

template <typename T, int W>
__global__ void __launch_bounds__(kThreads, QueryPass<W>::kCtas)
    differentiate_queries(const __grid_constant__ BackwardParams<float> p, const __grid_constant__ Plan plan,
                          const __grid_constant__ QueryPassArguments arguments) {
  using Pass = QueryPass<W>;
  constexpr int kTiles = Pass::kTiles, kKeys = Pass::kKeys, kColumns = Pass::kColumns, kParts = Pass::kParts;
  extern __shared__ __align__(1024) char tiles[];

  const int64_t heads = blockIdx.x / arguments.num_tiles;
  // Later tiles first: early ones see few keys, and fill the gaps at the end.
  const int64_t item = arguments.num_tiles - 1 - blockIdx.x % arguments.num_tiles;
  QueryPassState& state =
      *reinterpret_cast<QueryPassState*>(tiles + 2 * Pass::kRowTile + arguments.stages * 2 * Pass::kKeyTile);
  if (threadIdx.x == 0) {
    state.tile = find_query_tile(p, arguments.tiles, item, heads * arguments.heads, arguments.heads);
    const QueryTile& found = state.tile;
    state.blocks = found.has_keys() ? find_blocks(p, plan, found) : TileBlocks{};
    state.key = p.key.row(found.sequence.batch, found.sequence.key_begin, found.group);
    state.value = p.value.row(found.sequence.batch, found.sequence.key_begin, found.group);
    state.last_threshold = found.has_keys() ? p.threshold[(found.sequence.batch * p.groups + found.group) * p.queries +
                                                          found.sequence.query_begin + found.last - found.shift]
                                            : kNan;
  }
  __syncthreads();
  const QueryTile& tile = state.tile;
  const TileBlocks& blocks = state.blocks;
  if (tile.last < tile.first) return;
  const bool has_keys = tile.has_keys();
  const int32_t window = static_cast<int32_t>(p.pattern.window);

  const uint32_t query_tile = shared_address(tiles), grad_tile = query_tile + Pass::kRowTile;
  const uint32_t key_tiles = grad_tile + Pass::kRowTile;                          // [stages][key, value]
  int2* const ring = reinterpret_cast<int2*>(&state + 1);                         // key and score
  float* const soft_ring = reinterpret_cast<float*>(ring + Pass::kRing * kKeys);  // only with hard selection

  const auto sees_keys = [&](int r) { return has_keys && tile.exists(r) && (!tile.causal || tile.position(r) >= 0); };
  const auto copy_queries = [&](uint32_t target, const Rows& source) {
    copy_rows<W, Pass::kRows>(target, static_cast<int>(source.width), [&](int r, const auto& copy) {
      const bool read = sees_keys(r);
      copy(read ? source.row(tile.sequence.batch, tile.query(r), tile.query_head(r)) : source.data, read);
    });
  };
  copy_queries(query_tile, p.query);
  copy_queries(grad_tile, p.grad_out);

  const int lane = lane_id(), warp_row = warp_id() * 16 * kTiles;
  const auto row_of = [&](int i) { return warp_row + i / 2 * 16 + i % 2 * 8 + lane / 4; };
  const auto flat_row = [&](int r) {
    return (tile.sequence.batch * p.groups * p.heads_per_group + tile.query_head(r)) * p.queries + tile.query(r);
  };
  const float* threshold = p.threshold + (tile.sequence.batch * p.groups + tile.group) * p.queries;
  RowState rows[2 * kTiles];
  int32_t positions[2 * kTiles];
#pragma unroll
  for (int i = 0; i < 2 * kTiles; ++i) {
    const int r = row_of(i);
    positions[i] = tile.position(r);
    rows[i] = no_row();
    if (!sees_keys(r)) continue;
    rows[i] = make_row(p.lse[flat_row(r)], p.delta[flat_row(r)], threshold[tile.query(r)], p.pattern,
                       positions[i] - blocks.run.begin);
  }

  // Slots are loaded one part before their rows are, and those one part before they are needed.
  PartCursor<kKeys> cursor(blocks);
  struct Slot {
    int32_t key;
    float score;
    float soft_score;
    float block_score;
  };
  const auto load_slot = [&](int32_t part) {
    Slot slot{-1, -kInfinity, -kInfinity, -kInfinity};
    if (part < 0 || threadIdx.x >= kKeys) return slot;
    if (cursor.is_window(part)) {
      const int32_t key = cursor.first_window_key(part) + static_cast<int32_t>(threadIdx.x);
      if (key < tile.sequence.keys) slot.key = key;
    } else if (const int32_t i = part * kKeys + static_cast<int32_t>(threadIdx.x); i < blocks.run.count) {
      slot.key = blocks.run.key_of(i);
      slot.score = blocks.run.score_of(i);
      if (blocks.run.block_score != nullptr && part * kKeys + kKeys <= min(blocks.run.entering, blocks.run.count))
        slot.block_score = blocks.run.block_score[part / kParts];
      if (p.pattern.hard)
        slot.soft_score =
            p.scores[(tile.sequence.batch * p.groups + tile.group) * p.keys + tile.sequence.key_begin + slot.key];
    }
    return slot;
  };
  const auto publish_slot = [&](int turn, const Slot& slot) {
    if (threadIdx.x >= kKeys) return;
    if (threadIdx.x == 0) state.open[turn % Pass::kRing] = slot.block_score - state.last_threshold >= 1.0f;
    ring[turn % Pass::kRing * kKeys + threadIdx.x] = {slot.key, __float_as_int(slot.score)};
    if (p.pattern.hard) soft_ring[turn % Pass::kRing * kKeys + threadIdx.x] = slot.soft_score;
  };
  const auto copy_keys = [&](int turn, int stage) {
    const int2* slots = ring + turn % Pass::kRing * kKeys;
    const auto copy_from = [&](uint32_t target, const Rows& source, const char* base) {
      const int64_t stride = source.stride[1] * static_cast<int64_t>(sizeof(T));
      copy_rows<W, kKeys>(target, static_cast<int>(source.width), [&](int c, const auto& copy) {
        const int32_t key = slots[c].x;
        copy(base + max(key, 0) * stride, key >= 0);
      });
    };
    const uint32_t target = key_tiles + stage * 2 * Pass::kKeyTile;
    copy_from(target, p.key, state.key);
    copy_from(target + Pass::kKeyTile, p.value, state.value);
  };

  const float scale = static_cast<float>(p.scale);
  const int width = static_cast<int>(p.query.width), value_width = static_cast<int>(p.value.width);
  float grad_query[kTiles][W / 8][4];
  float gate_sums[2 * kTiles];
  for (bool careful = false;; careful = true) {
    set_zero(grad_query);
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) gate_sums[i] = 0.0f;
    int32_t part = cursor.next(0);
    int32_t next = part < 0 ? -1 : cursor.next(part + 1);
    publish_slot(0, load_slot(part));
    publish_slot(1, load_slot(next));
    __syncthreads();
    if (part >= 0) copy_keys(0, 0);
    commit_copies();

#pragma unroll 1
    for (int turn = 0; part >= 0; ++turn) {
      const int32_t after = next < 0 ? -1 : cursor.next(next + 1);
      const Slot slot = load_slot(after);
      const int stage = arguments.stages == 2 ? turn % 2 : 0;
      wait_copies<0>();
      __syncthreads();  // all are done with the part before, too
      if (arguments.stages == 2) {
        if (next >= 0) copy_keys(turn + 1, 1 - stage);
        commit_copies();
      }

      const uint32_t key_tile = key_tiles + stage * 2 * Pass::kKeyTile, value_tile = key_tile + Pass::kKeyTile;
      float logits[kTiles][kColumns][4], grad_weights[kTiles][kColumns][4];
      set_zero(logits);
      set_zero(grad_weights);
      multiply_transposed<T, W>(logits, query_tile + warp_row * kRowBytes<W>, key_tile, width);
      multiply_transposed<T, W>(grad_weights, grad_tile + warp_row * kRowBytes<W>, value_tile, value_width);

      const bool is_window = cursor.is_window(part);
      const int32_t first_slot = part * kKeys;
      const auto weigh = [&](auto gates) {
        constexpr Gates kGates = decltype(gates)::value;
#pragma unroll
        for (int n = 0; n < kColumns; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int c = 8 * n + lane % 4 * 2 + e;
            const int2 entry = ring[turn % Pass::kRing * kKeys + c];
            SlotState slot_state{__int_as_float(entry.y), 0.0f, entry.x};
            if constexpr (kGates == Gates::kHard) slot_state.soft_score = soft_ring[turn % Pass::kRing * kKeys + c];
            if constexpr (kGates == Gates::kWindow) {
              if (entry.x < 0) slot_state.from = kNever;  // no key
            } else {
              slot_state.from = first_slot + c < blocks.run.entering
                                    ? std::numeric_limits<int32_t>::min()
                                    : static_cast<int32_t>(min(entry.x + blocks.window, static_cast<int64_t>(kNever)));
            }
#pragma unroll
            for (int i = 0; i < 2 * kTiles; ++i)
              differentiate<kGates>(logits[i / 2][n][i % 2 * 2 + e], grad_weights[i / 2][n][i % 2 * 2 + e],
                                    gate_sums[i], rows[i], slot_state, positions[i], window, scale * kLog2e);
          }
      };
      if (is_window) {
        weigh(std::integral_constant<Gates, Gates::kWindow>{});
      } else if (p.pattern.hard) {
        weigh(std::integral_constant<Gates, Gates::kHard>{});
      } else if (state.open[turn % Pass::kRing]) {
        weigh(std::integral_constant<Gates, Gates::kOpen>{});
      } else {
        weigh(std::integral_constant<Gates, Gates::kSoft>{});
      }

      uint32_t factor[kTiles][kColumns / 2][4];
      round_factor<T>(factor, grad_weights);
      if (careful) {
        multiply_rows<T, W, true>(grad_query, factor, key_tile, 0, width);
      } else {
        multiply_rows<T, W, false>(grad_query, factor, key_tile, 0, width);
      }

      publish_slot(turn + 2, slot);
      if (arguments.stages == 1) {
        __syncthreads();
        if (next >= 0) copy_keys(turn + 1, 0);
        commit_copies();
      }
      part = next;
      next = after;
    }
    if (!__syncthreads_or(!all_finite(grad_query)) || careful) break;
  }
  wait_copies<0>();

#pragma unroll
  for (int i = 0; i < 2 * kTiles; ++i) {
    const int r = row_of(i);
    float sum = gate_sums[i];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if (!tile.exists(r)) continue;
    const float raw_threshold = threshold[tile.query(r)];
    const bool is_nan = raw_threshold != raw_threshold;  // NaN scores
    if (lane % 4 == 0) arguments.gate_sums[flat_row(r)] = is_nan ? kNan : sum;
    T* row = reinterpret_cast<T*>(p.grad_query.row(tile.sequence.batch, tile.query(r), tile.query_head(r)));
#pragma unroll
    for (int n = 0; n < W / 8; ++n) {
      if (8 * n >= width) break;
      const float low = is_nan ? kNan : scale * grad_query[i / 2][n][i % 2 * 2];
      const float high = is_nan ? kNan : scale * grad_query[i / 2][n][i % 2 * 2 + 1];
      *reinterpret_cast<uint32_t*>(row + 8 * n + lane % 4 * 2) = pack<T>(low, high);
    }
  }
}

template <typename T, int W>
void launch_query_pass(const BackwardParams<float>& params, const Plan& plan, const Workspace& work,
                       cudaStream_t stream) {
  using Pass = QueryPass<W>;
  QueryPassArguments arguments{};
  arguments.gate_sums = work.gate_sums;
  arguments.heads = heads_per_tile(params.heads_per_group);
  arguments.tiles = query_tiles(Pass::kRows, arguments.heads);
  arguments.num_tiles = params.sequences.num_items(params.sequences.cu_q, params.queries, arguments.tiles);
  const bool hard = params.pattern.hard;
  arguments.stages = choose_stages(Pass::shared_bytes(1, hard), Pass::shared_bytes(2, hard));
  const int64_t packs = params.groups * params.heads_per_group / arguments.heads;
  launch("differentiate_queries", differentiate_queries<T, W>, packs * arguments.num_tiles, kThreads,
         Pass::shared_bytes(arguments.stages, hard), stream, params, plan, arguments);
}

}  // namespace sparsek::cuda::sm80
