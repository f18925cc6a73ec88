// Forward on Hopper: a persistent kernel of one producer and three consumer warpgroups. The producer brings the rows of
// each unit of 64 keys, K and V apart and a few units ahead: in one copy where the run's list has been copied, else row
// by row. Each consumer attends with 64 rows of the tile; while one makes its weights, the others keep the tensor cores
// busy. A second launch does the tiles again in which values were not finite.
#pragma once

#include <algorithm>

#include "cuda/common/launch.cuh"
#include "cuda/sm90/forward/consumer.cuh"
#include "cuda/sm90/forward/launch.h"
#include "cuda/sm90/forward/producer.cuh"

namespace sparsek::cuda::sm90 {

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) forward(const __grid_constant__ ForwardArguments a) {
  using Shared = typename Traits::Shared;
  if constexpr (Traits::kCareful) {  // seldom is there anything to do
    bool any = false;
    for (int64_t i = blockIdx.x + int64_t{threadIdx.x} * gridDim.x; i < a.work;
         i += int64_t{Traits::kThreads} * gridDim.x)
      any = any || is_suspect<Traits>(a, i);
    if (!__syncthreads_or(any)) return;
  }
  extern __shared__ char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory + (-shared_address(memory) & 1023));
  if (threadIdx.x == 0) {
    constexpr int kConsumerWarps = 4 * Traits::kConsumers;
    for (int stage = 0; stage < Traits::kQueryStages; ++stage) {
      barrier_init(shared.number_full[stage], 1);
      barrier_init(shared.query_full[stage], 32 + 1);
      barrier_init(shared.query_empty[stage], kConsumerWarps + 3);
    }
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      barrier_init(shared.key_full[stage], 64 + 2);
      barrier_init(shared.key_empty[stage], kConsumerWarps);
      barrier_init(shared.value_full[stage], 32);
      barrier_init(shared.value_empty[stage], (Traits::kCareful ? 32 : 1) * kConsumerWarps);
    }
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    give_registers<Traits::kProducerRegisters>();
    if (threadIdx.x < 64) {
      KeyProducer<Traits>(a, shared).run();
    } else if (threadIdx.x < 96) {
      ValueProducer<Traits>(a, shared).run();
    } else {
      QueryProducer<Traits>(a, shared).run();
    }
  } else {
    take_registers<Traits::kConsumerRegisters>();
    Consumer<Traits>(a, shared).run();
  }
}

template <typename Traits>
void launch_pass(const ForwardArguments& arguments, int multiprocessors, cudaStream_t stream) {
  launch("forward on sm_90a", forward<Traits>, std::min<int64_t>(arguments.work, multiprocessors), Traits::kThreads,
         sizeof(typename Traits::Shared) + 1024, stream, arguments);
}

template <typename Element>
void launch_pass_of(const ForwardArguments& arguments, int width, bool careful, int multiprocessors,
                    cudaStream_t stream) {
  const auto launch = width == 64 ? careful ? launch_pass<ForwardTraits<Element, 64, true>>
                                            : launch_pass<ForwardTraits<Element, 64, false>>
                      : careful   ? launch_pass<ForwardTraits<Element, 128, true>>
                                  : launch_pass<ForwardTraits<Element, 128, false>>;
  launch(arguments, multiprocessors, stream);
}

}  // namespace sparsek::cuda::sm90
