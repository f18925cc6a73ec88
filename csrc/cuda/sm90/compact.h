// Copies of the rows that the lists of a plan name, in their order and as wgmma reads them: a unit of a list is then
// one block of memory, which one instruction brings. Lists that find no room have no copies, and are gathered row by
// row.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/tensor.h"
#include "cuda/common/params.h"
#include "cuda/plan/plan.h"

namespace sparsek::cuda::sm90 {

constexpr int kUnit = kBlock;  // slots

struct Compact {
  int32_t* first_unit;  // [runs, G]: of a list's copies, or -1 where there are none; null: no list has any
  int32_t* owner;       // [parts, units]: the list that a unit belongs to, or -1
  char* key;      // [units][width / 64][kUnit][64 elements], in the 128-byte swizzle, zeros where there is no slot
  char* value;    // the same of the values
  int64_t units;  // there is room for
};

struct CompactMemory {
  Compact compact;
  Tensor workspace;
  int64_t parts;  // 2: there is room for a half of the groups, and then for the other; 0: nothing is copied
};

// Room for copies of 16-bit keys and values whose rows are aligned to 16 bytes, padded to `width` columns, 64 or 128.
// `readers`: how many tiles of queries read a list; for few of them none is copied.
CompactMemory make_compact(const AttentionParams<float>& params, const Plan& plan, int width, int64_t readers,
                           const Tensor& reference);

// Gives the lists their units: those of each part, of so many groups, from the first unit on.
void allocate_units(const AttentionParams<float>& params, const Plan& plan, const Compact& compact,
                    int64_t groups_of_part, cudaStream_t stream);
// Copies what the lists of a part name, over the copies of other parts.
void copy_units(const AttentionParams<float>& params, const Plan& plan, int width, const Compact& compact, int64_t part,
                cudaStream_t stream);

}  // namespace sparsek::cuda::sm90
