// Sizes, shared memory and barriers of Hopper's forward kernel for short sequences.
#pragma once

#include <cstdint>

#include "cuda/sm90/ring.cuh"
#include "cuda/sm90/short_forward/arguments.h"
#include "cuda/sm90/short_forward/launch.h"

namespace sparsek::cuda::sm90 {

template <typename Element_, int kWidth_>
struct ShortForwardTraits {
  using Element = Element_;
  static constexpr int kWidth = kWidth_;  // K and Kv, padded
  // Warpgroups that attend, which hide each other's latencies: as many as registers allow.
  static constexpr int kConsumers = kWidth > 64 ? 3 : 4;
  static constexpr int kThreads = 128 * (1 + kConsumers);
  static constexpr int kTileRows = kShortTileRows;  // of a consumer
  static constexpr int kRows = kTileRows * kConsumers;
  static constexpr int kSlots = 64;  // keys of a unit of work
  static constexpr int kStages = kWidth > 64 ? 3 : 8;
  static constexpr int kQueryStages = 2;  // tiles
  static constexpr int kMaxKeys = static_cast<int>(kMaxShortKeysSm90);
  static_assert(kMaxKeys % kSlots == 0);
  static constexpr int kProducerRegisters = kWidth > 64 ? 56 : 32;
  static constexpr int kConsumerRegisters = kWidth > 64 ? 152 : 112;
  // What a launch gives its threads, of which no more than these are shared out: else the kernel waits for ever.
  static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= (1 + kConsumers) * kLaunchRegisters);

  // What consumers must know of a job.
  struct Job {
    int32_t batch;
    int32_t head;   // first query head
    int32_t query;  // of the first row
    int32_t rows;
    int32_t units;
    float threshold;  // NaN: out and LSE are NaN
    float* lse;       // of the first row
  };

  // log2 of the gates, of the slots that one thread of a row has, in order. Padded, so that the four threads of a row
  // read from different banks.
  struct alignas(16) Bias {
    float column[4][20];
    bool solid[2];  // whether all gates of a half are 1
  };

  // Operands are columns of 64 elements: rows of 128 bytes in the 128-byte swizzle.
  struct Shared {
    alignas(1024) Element query[kConsumers][kQueryStages][kWidth / 64][kTileRows][64];  // then the output, on its way
    alignas(1024) Element key[kStages][kWidth / 64][kSlots][64];
    alignas(1024) Element value[kStages][kWidth / 64][kSlots][64];
    Bias bias[kStages];
    alignas(16) int32_t list_key[kMaxKeys];  // of the producer: the keys of its job
    float list_bias[kMaxKeys];
    int2 found[2][4];  // by its warps: how many keys, and the first
    Job jobs[2];
    uint64_t job_full[2], job_empty[2];
    uint64_t query_full[kConsumers][kQueryStages], query_empty[kConsumers][kQueryStages];
    uint64_t full[kStages], empty[kStages];
  };
  static constexpr int64_t kSharedBytes = sizeof(Shared) + 1024;  // to be aligned
  static_assert(kSharedBytes <= 227 * 1024);
};

constexpr int kListBarrier = 1;  // named barrier of the producer's warps; 0 is __syncthreads

}  // namespace sparsek::cuda::sm90
