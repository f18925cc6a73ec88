// What a tile of queries must look at: shared by the tensor-core kernels, forward and backward.
#pragma once

#include "cuda/plan/plan.h"

namespace sparsek::cuda {

// `rows` rows: row r is position begin + r / heads, and query head head + r % heads, for `heads` heads of one group,
// a power of two.
struct QueryTile {
  Sequence sequence;
  int64_t index;  // of the sequence
  int64_t group;
  int64_t head;   // first query head
  int32_t heads;  // query heads that share the tile
  int32_t log_heads;
  int32_t begin;  // position of row 0; not causal: index of the query in its sequence
  int32_t first;  // positions of the first and the last query that exist: none if last < first
  int32_t last;
  int32_t shift;  // position less index in the sequence
  bool causal;

  __device__ int32_t position(int r) const { return begin + (r >> log_heads); }
  __device__ bool exists(int r) const { return position(r) >= first && position(r) <= last; }
  // Row of the batch entry.
  __device__ int64_t query(int r) const { return sequence.query_begin + position(r) - shift; }
  __device__ bool has_keys() const { return last >= first && sequence.keys > 0 && (!causal || last >= 0); }
  __device__ int64_t query_head(int r) const { return head + (r & (heads - 1)); }
};

__device__ inline QueryTile find_query_tile(const AttentionParams<float>& p, Items tiles, int64_t item, int64_t head,
                                            int32_t heads) {
  QueryTile tile;
  const int64_t s = p.sequences.find(p.sequences.cu_q, p.queries, tiles, item);
  tile.index = s;
  tile.sequence = p.sequences.at(s);
  tile.head = head;
  tile.heads = heads;
  tile.log_heads = 31 - __clz(heads);
  tile.group = divide(head, p.heads_per_group);
  tile.causal = p.pattern.causal;
  tile.shift = tile.causal ? tile.sequence.shift() : 0;
  const int32_t size = static_cast<int32_t>(tiles.size);
  const int32_t below = tile.shift < 0 ? (tile.shift - size + 1) / size : tile.shift / size;  // rounded down
  const int64_t index = item - p.sequences.first_item(p.sequences.cu_q, p.queries, tiles, s);
  const int64_t begin = (below + index) * size;
  const int64_t end = static_cast<int64_t>(tile.shift) + tile.sequence.queries;
  tile.begin = static_cast<int32_t>(min(begin, end));
  tile.first = max(tile.begin, tile.shift);
  tile.last = static_cast<int32_t>(min(begin + size, end)) - 1;
  return tile;
}

// The run that a tile belongs to, as slots with a key and a score each.
struct RunView {
  const int32_t* key;           // null: slot = key
  const float* score;           // [slots]
  const int32_t* expiry;        // dense with hard selection: [keys], the scores are made of them
  const int32_t* block_expiry;  // [blocks]
  int64_t block_stride;
  const float* block_score;  // [blocks], or null where no block is known to be solid
  int32_t count;             // slots
  int32_t entering;          // the first slot that may enter later than the first query
  int32_t begin;             // first position of the run
  int64_t list;              // number of its list, or -1 where it has none

  __device__ int32_t key_of(int32_t slot) const { return key == nullptr ? slot : key[slot]; }
  __device__ float score_of(int32_t slot) const {
    return expiry == nullptr ? score[slot] : static_cast<float>(min(expiry[slot] - begin, kFarAhead));
  }
};

__device__ inline RunView find_run(const AttentionParams<float>& p, const Plan& plan, const Sequence& sequence,
                                   int64_t s, int64_t group, int32_t position) {
  RunView run{};
  const Sequences& sequences = p.sequences;
  const int64_t first_block = sequences.first_item(sequences.cu_k, p.keys, plan.blocks, s);
  const int64_t r = p.pattern.causal ? divide(position, plan.runs.size) : 0;
  const int64_t item = sequences.first_item(sequences.cu_k, p.keys, plan.runs, s) + r;
  const RunHead head = plan.head[item * p.groups + group];
  run.begin = static_cast<int32_t>(p.pattern.causal ? r * plan.runs.size : 0);
  run.list = head.count == kDense ? -1 : item * p.groups + group;
  if (head.count == kDense) {
    const int64_t column = (sequence.batch * p.groups + group) * p.keys + sequence.key_begin;
    run.score = p.scores + column;
    run.expiry = p.pattern.hard ? p.expiry + column : nullptr;
    run.block_expiry = plan.dense_expiry + first_block * p.groups + group;
    run.block_stride = p.groups;
    const int64_t end = min(run.begin + plan.runs.size, static_cast<int64_t>(sequence.keys)) - p.pattern.window;
    run.count = static_cast<int32_t>(max(end, int64_t{0}));
    run.entering = 0;
    return run;
  }
  const int64_t first_slot = plan.first_slot(item, first_block, group, p.groups);
  run.key = plan.key + first_slot;
  run.score = plan.score + first_slot;
  run.block_expiry = plan.block_expiry + first_slot / kBlock;
  run.block_stride = 1;
  run.block_score = plan.block_score + first_slot / kBlock;
  run.count = head.count;
  run.entering = head.entering;
  return run;
}

// The blocks of kBlock keys that a tile reads: numbers [0, lists) are blocks of its run's slots, [lists, end) blocks of
// the keys that are in the window of some query.
struct TileBlocks {
  RunView run;
  int64_t window;
  int32_t first, last;  // positions of the tile
  int32_t lists;
  int32_t end;
  int32_t window_key;  // first key of block `lists`

  __device__ bool is_window(int32_t block) const { return block >= lists; }
  __device__ int32_t first_key(int32_t block) const { return window_key + (block - lists) * kBlock; }

  // Whether any query of the tile can see a slot of the block.
  __device__ bool is_live(int32_t block) const {
    if (run.block_expiry[block * run.block_stride] <= first) return false;
    const int32_t slot = block * kBlock;
    return slot < run.entering || run.key_of(slot) + window <= last;
  }

  // The first block from `block` on that is to be read, or `end`. For all lanes of a warp together.
  __device__ int32_t next(int32_t block) const {
    while (block < lists) {
      const int32_t mine = block + static_cast<int32_t>(threadIdx.x % 32);
      const uint32_t live = __ballot_sync(~0u, mine < lists && is_live(mine));
      if (live != 0) return block + __ffs(live) - 1;
      block = min(block + 32, lists);
    }
    return block;
  }
};

// For a tile that has keys.
__device__ inline TileBlocks find_blocks(const AttentionParams<float>& p, const Plan& plan, const QueryTile& tile) {
  TileBlocks blocks;
  blocks.first = tile.causal ? max(tile.first, 0) : 0;
  blocks.last = tile.causal ? tile.last : 0;
  blocks.window = tile.causal ? p.pattern.window : 0;
  blocks.run = find_run(p, plan, tile.sequence, tile.index, tile.group, blocks.first);
  if (!tile.causal) blocks.run.entering = blocks.run.count;
  blocks.lists = (blocks.run.count + kBlock - 1) / kBlock;
  blocks.end = blocks.lists;
  blocks.window_key = 0;
  if (blocks.window > 0) {
    const int64_t earliest = static_cast<int64_t>(blocks.first) - blocks.window + 1;
    blocks.window_key = static_cast<int32_t>(max(earliest, int64_t{0})) / kBlock * kBlock;
    blocks.end += (blocks.last - blocks.window_key) / kBlock + 1;
  }
  return blocks;
}

}  // namespace sparsek::cuda
