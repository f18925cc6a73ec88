// How the copy engine finds tiles of rows: tensor maps.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "common/rows.h"

namespace sparsek::cuda::sm90 {

// Tiles of 64 columns by `rows` rows of [batches, queries, heads], which are `tile_heads` neighbouring heads of
// neighbouring queries: a row in shared memory is 128 bytes in the 128-byte swizzle. What lies beyond the tensor is
// read as 0 and not written. Elements have 16 bits, and rows are aligned to 16 bytes.
CUtensorMap make_tile_map(const Rows& tensor, int64_t batches, int64_t queries, int64_t heads, int32_t tile_heads,
                          int32_t rows);

}  // namespace sparsek::cuda::sm90
