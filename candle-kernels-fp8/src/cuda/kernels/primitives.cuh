// Single instructions that CUDA C++ has no name for.
#pragma once

#include "common.cuh"
#include "shared.cuh"

// The larger of two magnitudes; NaN, without a sign, if one of them is.
__device__ __forceinline__ float max_magnitude(float a, float b) {
    float result;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(fabsf(a)), "f"(fabsf(b)));
    return result;
}

// Between -limit and limit; NaN stays NaN.
__device__ __forceinline__ float clamp(float value, float limit) {
    float result;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(value), "f"(limit));
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(result) : "f"(-limit));
    return result;
}

// 2^value with an error of at most 2 ulp; what would be subnormal is 0.
__device__ __forceinline__ float exp2_fast(float value) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
    return result;
}

// 1 / value with an error of at most 1 ulp, for values whose reciprocal is normal.
__device__ __forceinline__ float reciprocal_fast(float value) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
    return result;
}

// Counts up to `last` and then from 0 again; orders what the block wrote before, and what it reads after.
__device__ __forceinline__ uint32_t count(uint32_t* counter, uint32_t last) {
    uint32_t before;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(last) : "memory");
    return before;
}

// 16 bytes that nothing writes while the kernel runs. Stays where it stands: before the wait for inputs, say.
__device__ __forceinline__ uint4 load_constant(const void* address) {
    uint4 value;
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(address));
    return value;
}

// Values that the blocks of a cluster send each other: a receiver gets ready, all blocks wait until all are, senders
// send, and the receiver's threads wait for all that was announced. Barriers of the whole cluster would do, but
// releasing values by them waits for every write to memory.

// By one thread of a block: `barrier` is to wait for so many bytes, once.
__device__ __forceinline__ void announce(uint64_t* barrier, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
    const uint32_t address = shared_address(barrier);
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address) : "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address), "r"(bytes) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// By all threads, before and after what needs no other block.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Writes to the place that `own` is in another block's shared memory, for its `barrier`.
__device__ __forceinline__ void send(uint32_t* own, uint64_t* barrier, uint32_t block, uint32_t value) {
#if __CUDA_ARCH__ >= 900
    const uint32_t to = shared_address(own), at = shared_address(barrier);
    asm volatile("{ .reg .b32 to, at; mapa.shared::cluster.u32 to, %0, %2; mapa.shared::cluster.u32 at, %1, %2;"
                 " st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [to], %3, [at]; }" ::"r"(to),
                 "r"(at), "r"(block), "r"(value)
                 : "memory");
#endif
}

__device__ __forceinline__ void receive(uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
    const uint32_t address = shared_address(barrier);
    uint32_t done = 0;
    while (!done) {
        asm volatile("{ .reg .pred done; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%1], 0;"
                     " selp.u32 %0, 1, 0, done; }"
                     : "=r"(done)
                     : "r"(address)
                     : "memory");
    }
#endif
}
