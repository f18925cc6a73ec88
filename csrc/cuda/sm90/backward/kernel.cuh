// Backward on Hopper: a persistent kernel of one producer and two consumer warpgroups. A unit of 128 keys of a list, or
// of a block of keys with their windows, is gathered once and goes through the tiles of queries that may see a key of
// it. Its gradients of keys and values stay in registers, those of queries are added tile by tile to sums in global
// memory; both in a fixed order, so that gradients are the same bits every time. A second launch does the groups again
// in which values were not finite.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cuda/common/launch.cuh"
#include "cuda/sm90/backward/consumer.cuh"
#include "cuda/sm90/backward/launch.h"
#include "cuda/sm90/backward/loader.cuh"
#include "cuda/sm90/backward/scout.cuh"
#include "cuda/sm90/backward/writer.cuh"

namespace sparsek::cuda::sm90 {

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) backward(const __grid_constant__ BackwardArguments a) {
  using Shared = typename Traits::Shared;
  extern __shared__ char memory[];
  if (Traits::kCareful && a.suspects[a.params.batch * a.params.groups] == 0) return;
  Shared& shared = *reinterpret_cast<Shared*>(memory + (-shared_address(memory) & 1023));
  if (threadIdx.x == 0) {
    constexpr int kConsumerWarps = Traits::kConsumerWarps;
    for (int i = 0; i < Traits::kUnits; ++i) {
      barrier_init(shared.unit_full[i], 1);
      barrier_init(shared.unit_empty[i], kConsumerWarps + 3);
    }
    barrier_init(shared.unit_wanted, 1);
    barrier_init(shared.key_full, 1);
    barrier_init(shared.value_full, 1);
    barrier_init(shared.keys_empty, kConsumerWarps);
    for (int i = 0; i < Traits::kQueryStages; ++i) {
      barrier_init(shared.query_full[i], 1);
      barrier_init(shared.query_empty[i], kConsumerWarps);
    }
    for (int i = 0; i < Traits::kGradStages; ++i) {
      barrier_init(shared.grad_full[i], 1);
      barrier_init(shared.grad_empty[i], kConsumerWarps);
    }
    barrier_init(shared.sums_full, kConsumerWarps);
    barrier_init(shared.sums_empty, 1);
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    give_registers<Traits::kProducerRegisters>();
    if (threadIdx.x < 32) {
      Loader<Traits, false>(a, shared).run();
    } else if (threadIdx.x < 64) {
      Loader<Traits, true>(a, shared).run();
    } else if (threadIdx.x < 96) {
      Scout<Traits>(a, shared).run();
    } else {
      Writer<Traits>(a, shared).run();
    }
  } else {
    take_registers<Traits::kConsumerRegisters>();
    Consumer<Traits>(a, shared).run();
  }
}

template <typename Traits>
void launch_units(const BackwardArguments& arguments, int multiprocessors, cudaStream_t stream) {
  launch("backward on sm_90a", backward<Traits>, multiprocessors, Traits::kThreads,
         sizeof(typename Traits::Shared) + 1024, stream, arguments);
}

template <typename Element>
void launch_units_of(const BackwardArguments& arguments, bool careful, int multiprocessors, cudaStream_t stream) {
  const auto launch = arguments.width == 64 ? careful ? launch_units<BackwardTraits<Element, 64, true>>
                                                      : launch_units<BackwardTraits<Element, 64, false>>
                      : careful             ? launch_units<BackwardTraits<Element, 128, true>>
                                            : launch_units<BackwardTraits<Element, 128, false>>;
  launch(arguments, multiprocessors, stream);
}

}  // namespace sparsek::cuda::sm90
