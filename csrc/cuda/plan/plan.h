// Lists of the keys that a run of queries sees, which the tensor-core kernels gather by.
//
// A run is a stretch of consecutive positions of one sequence (all of them where the call is not causal), for one
// key/value head. Its slots are, in this order:
//   seen at once: keys that its first query sees by their scores, the highest first, to a fifteenth, and in ascending
//       order of the keys where those are as high: neighbours keep their gates at 1, or above 0, about equally long;
//   entering: keys whose window ends within the run, seen by their scores from position key + window on, in ascending
//       order.
// Nothing in that order depends on later tokens, so neither does a bit of what a query computes. Keys are not listed
// for the queries that have them in their window: kernels read those where they lie.
//
// Where a list would not fit, the run is dense: slot = key, for all keys whose window ends before the run does.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/tensor.h"
#include "cuda/common/params.h"

namespace sparsek::cuda {

constexpr int kBlock = 64;  // slots that share an entry of the tables
constexpr int32_t kDense = -1;
constexpr int32_t kFarAhead = 1 << 22;  // positions that float32 counts exactly

struct RunHead {
  int32_t count;     // slots, or kDense
  int32_t entering;  // the first slot that enters within the run
};

// Pointers into one workspace on the device.
struct Plan {
  Items runs;             // over the keys: the runs of each sequence; one per sequence if not causal
  Items blocks;           // over the keys: blocks of kBlock keys of each sequence
  int64_t list_size;      // slots per list, a multiple of kBlock; 0 if not causal: as many as a sequence has blocks for
  int64_t num_blocks;     // block items
  RunHead* head;          // [runs, G]
  int32_t* key;           // [lists]: relative to the first key of the sequence
  float* score;           // [lists]: gate = clip(score - threshold, 0, 1); with hard selection expiry - first position
                          // of the run, and gate = clip(score - (position - first position of the run), 0, 1)
  int32_t* block_expiry;  // [lists / kBlock]: the latest expiry of a block's slots
  float* block_score;     // [lists / kBlock]: their lowest score
  int32_t* dense_expiry;  // [blocks, G]: the latest expiry of a block of keys, for dense runs

  SPARSEK_HOST_DEVICE int64_t first_slot(int64_t run, int64_t first_block, int64_t group, int64_t groups) const {
    return list_size > 0 ? (run * groups + group) * list_size : (group * num_blocks + first_block) * kBlock;
  }
};

// A plan in memory that lasts as long as `workspace`.
struct PlanMemory {
  Plan plan;
  Tensor workspace;
};

// Heads of a group share a tile of queries, and with it the rows that it gathers: so many, a power of two.
int32_t heads_per_tile(int64_t heads_per_group);

// Runs of `run_size` positions, a multiple of the rows of the kernels' query tiles; lists have room for four times as
// many slots. Shorter runs have tighter lists, longer ones fewer of them.
int64_t forward_run_size(const Sequences& sequences, int64_t tile_rows);
int64_t backward_run_size(const Sequences& sequences, int64_t heads_per_group);
PlanMemory make_plan(const AttentionParams<float>& params, int64_t run_size, const Tensor& reference,
                     cudaStream_t stream);

}  // namespace sparsek::cuda
