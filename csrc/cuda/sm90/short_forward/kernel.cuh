// Forward on Hopper where all queries of a key/value head see the same keys, and few: short sequences that are not
// causal. A CTA lists the keys of one head, gathers their rows, all of them where they fit and else in turn, and
// attends with its rows of queries, 64 to a warpgroup at a time. There are no producers: several CTAs or warpgroups
// share a multiprocessor, and while some wait, others work. Since rows that see one key see all, values that are not
// finite reach no row that does not see them, and no second pass is needed.
#pragma once

#include <algorithm>

#include "cuda/common/launch.cuh"
#include "cuda/sm90/short_forward/consumer.cuh"
#include "cuda/sm90/short_forward/keys.cuh"
#include "cuda/sm90/short_forward/launch.h"

namespace sparsek::cuda::sm90 {

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kCtas)
    short_forward(const __grid_constant__ ShortForwardArguments a) {
  using Shared = typename Traits::Shared;
  extern __shared__ char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory + (-shared_address(memory) & 1023));
  const ShortWork work(a);
  const ShortGates<Traits> gates(a, work);
  if (threadIdx.x == 0) {
    for (auto& barriers : shared.query_full)
      for (uint64_t& barrier : barriers) barrier_init(barrier, 128);
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      barrier_init(shared.key_full[stage], 128);
      barrier_init(shared.key_empty[stage], Traits::kWarps);
      barrier_init(shared.value_full[stage], 128);
      barrier_init(shared.value_empty[stage], Traits::kWarps);
    }
  }
  __syncthreads();
  ShortConsumer<Traits> consumer(a, work, shared);
  consumer.load_queries(0);
  const int32_t units = gates.list(shared);
  consumer.run(units, gates.threshold());
}

template <typename Element, int kWidth>
void launch_short_forward(ShortForwardArguments arguments, int multiprocessors, cudaStream_t stream) {
  using Traits = ShortForwardTraits<Element, kWidth>;
  const auto divide_up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t packs = arguments.params.batch * arguments.params.groups * arguments.packs;
  const int64_t tiles = divide_up(arguments.rows, Traits::kRows);
  if (packs * tiles == 0) return;
  // Few packs are split, each CTA with keys of its own: the last of so many turns costs little.
  constexpr int64_t kTurns = 4;
  const int64_t wanted = std::min(divide_up(kTurns * Traits::kCtas * multiprocessors, packs), tiles);
  const int64_t split_tiles = divide_up(tiles, wanted);
  arguments.splits = divide_up(tiles, split_tiles);
  arguments.split_rows = split_tiles * Traits::kRows;
  launch("short forward on sm_90a", short_forward<Traits>, packs * arguments.splits, Traits::kThreads,
         Traits::kSharedBytes, stream, arguments);
}

}  // namespace sparsek::cuda::sm90
