// Wrappers of the Hopper instructions that these kernels use, named after what they do.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/common/ptx.cuh"

namespace sparsek::cuda::sm90 {

// --- Copies ---

// Waits for all copies that this thread has issued.
__device__ inline void wait_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
template <typename T>
__device__ inline void load_shared_16(T& x, uint32_t shared) {
  static_assert(sizeof(T) == 16);
  uint32_t (&r)[4] = reinterpret_cast<uint32_t (&)[4]>(x);
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
}
template <typename T>
__device__ inline void store_shared_16(const T (&x)[8], uint32_t shared) {
  const uint32_t (&r)[4] = reinterpret_cast<const uint32_t (&)[4]>(x);
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}
// Copies `bytes`, a multiple of 16, from global to shared memory; `barrier` must expect them.
__device__ inline void copy_bulk(uint32_t shared, const void* global, uint32_t bytes, uint64_t& barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
               "l"(global), "r"(bytes), "r"(shared_address(&barrier))
               : "memory");
}
// The same for a tile of a tensor map (sm90/tile_map.h), from these indices on; and a tile's way back, in a group of
// bulk copies.
__device__ inline void load_tile(uint32_t shared, const void* map, int column, int head, int query, int batch,
                                 uint64_t& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(shared),
      "l"(map), "r"(column), "r"(head), "r"(query), "r"(batch), "r"(shared_address(&barrier))
      : "memory");
}
__device__ inline void store_tile(const void* map, int column, int head, int query, int batch, uint32_t shared) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::"l"(map),
               "r"(column), "r"(head), "r"(query), "r"(batch), "r"(shared)
               : "memory");
}
// Makes what this thread knows to be written to shared memory, by others too, visible to the tensor cores, which read
// through another proxy.
__device__ inline void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Bulk copies of consecutive bytes from shared to global memory, or sums of floats added to what is there; addresses
// and bytes are multiples of 16. One thread issues them and waits for them.
__device__ inline void bulk_store(void* global, uint32_t shared, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global), "r"(shared), "r"(bytes)
               : "memory");
}
__device__ inline void bulk_add(void* global, uint32_t shared, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(global), "r"(shared),
               "r"(bytes)
               : "memory");
}
__device__ inline void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until shared memory has been read.
__device__ inline void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
// Until global memory has been written.
__device__ inline void bulk_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
// Orders accesses of global memory through the bulk copies' proxy and through the ordinary one.
__device__ inline void fence_async_proxy_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// Adds to two floats in global memory.
__device__ inline void add_pair(float2* to, float2 x) {
  asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(x.x), "f"(x.y) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements to shared memory; lanes 8 i to 8 i + 7 hold the addresses of matrix i's rows.
__device__ inline void store_matrices(uint32_t shared, const uint32_t (&x)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(x[0]), "r"(x[1]),
               "r"(x[2]), "r"(x[3])
               : "memory");
}

// --- Barriers ---

__device__ inline void barrier_init(uint64_t& barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}
__device__ inline void barrier_arrive(uint64_t& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}
// Once for all of a warp, after what its lanes have done; `lane`: of this thread.
__device__ inline void barrier_arrive_as_warp(uint64_t& barrier, int lane) {
  __syncwarp();
  if (lane == 0) barrier_arrive(barrier);
}
// The phase ends no earlier than this many bytes have been copied.
__device__ inline void barrier_expect(uint64_t& barrier, uint32_t bytes) {
  asm volatile("mbarrier.expect_tx.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes) : "memory");
}
// Arrives, without being counted as one more, once all copies that this thread has issued so far are done.
__device__ inline void barrier_arrive_after_copies(uint64_t& barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(&barrier)) : "memory");
}
// Whether the phase of this parity is over. Does not wait, unlike barrier_try.
__device__ inline bool barrier_test(uint64_t& barrier, uint32_t parity) {
  uint32_t done;
  asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(done)
               : "r"(shared_address(&barrier)), "r"(parity)
               : "memory");
  return done != 0;
}
// The same, but if it is not over, sleeps until it is or some time has passed.
__device__ inline bool barrier_try(uint64_t& barrier, uint32_t parity) {
  uint32_t done;
  asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(done)
               : "r"(shared_address(&barrier)), "r"(parity)
               : "memory");
  return done != 0;
}
__device__ inline void barrier_wait(uint64_t& barrier, uint32_t parity) {
  while (!barrier_try(barrier, parity)) {
  }
}
__device__ inline void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Arrives without waiting for the others.
__device__ inline void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

template <int N>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

}  // namespace sparsek::cuda::sm90
