// Forward on Hopper where all queries of a key/value head see the same keys, and few: short sequences that are not
// causal. A persistent kernel, whose producer lists the keys of a job, gathers their rows and brings its queries, while
// the consumers attend with the job before. Units of keys that all fit stay for all of a job's tiles. Since rows that
// see one key see all, values that are not finite reach no row that does not see them: there is no second pass.
#pragma once

#include <algorithm>

#include "cuda/common/launch.cuh"
#include "cuda/sm90/short_forward/consumer.cuh"
#include "cuda/sm90/short_forward/launch.h"
#include "cuda/sm90/short_forward/producer.cuh"

namespace sparsek::cuda::sm90 {

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) short_forward(const __grid_constant__ ShortForwardArguments a) {
  using Shared = typename Traits::Shared;
  extern __shared__ char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory + (-shared_address(memory) & 1023));
  if (threadIdx.x == 0) {
    constexpr int kConsumerWarps = 4 * Traits::kConsumers;
    for (int stage = 0; stage < 2; ++stage) {
      barrier_init(shared.job_full[stage], 1);
      barrier_init(shared.job_empty[stage], kConsumerWarps);
    }
    for (int consumer = 0; consumer < Traits::kConsumers; ++consumer)
      for (int stage = 0; stage < Traits::kQueryStages; ++stage) {
        barrier_init(shared.query_full[consumer][stage], 1);
        barrier_init(shared.query_empty[consumer][stage], 4);
      }
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      barrier_init(shared.full[stage], 128 + 4);
      barrier_init(shared.empty[stage], kConsumerWarps);
    }
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    give_registers<Traits::kProducerRegisters>();
    ShortProducer<Traits>(a, shared).run();
  } else {
    take_registers<Traits::kConsumerRegisters>();
    ShortConsumer<Traits>(a, shared).run();
  }
}

template <typename Element, int kWidth>
void launch_short_forward(const ShortForwardArguments& a, int multiprocessors, cudaStream_t stream) {
  ShortForwardArguments arguments = a;
  using Traits = ShortForwardTraits<Element, kWidth>;
  const auto divide_up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t packs = arguments.params.batch * arguments.params.groups * arguments.packs;
  const int64_t tiles = divide_up(arguments.rows, Traits::kRows);
  if (packs * tiles == 0) return;
  // Few packs are split, each part with keys of its own: the last of so many turns costs little.
  constexpr int64_t kTurns = 2;
  const int64_t splits = std::min(divide_up(kTurns * multiprocessors, packs), tiles);
  arguments.job_rows = divide_up(tiles, splits) * Traits::kRows;
  arguments.splits = divide_up(arguments.rows, arguments.job_rows);
  arguments.jobs = packs * arguments.splits;
  launch("short forward on sm_90a", short_forward<Traits>, std::min<int64_t>(arguments.jobs, multiprocessors),
         Traits::kThreads, Traits::kSharedBytes, stream, arguments);
}

}  // namespace sparsek::cuda::sm90
