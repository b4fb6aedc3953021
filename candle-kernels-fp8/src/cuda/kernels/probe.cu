// A pure read of memory: what products with few rows are measured against.

#include "common.cuh"

// Reads `count` pieces of 16 bytes. Each thread has eight loads under way.
extern "C" __global__ void __launch_bounds__(512) probe_read(const uint4* from, uint64_t count, uint32_t* out) {
    launch_dependents();
    uint32_t sum = 0;
    const uint64_t step = uint64_t(gridDim.x) * blockDim.x;
    uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    for (; i + 7 * step < count; i += 8 * step) {
        uint4 values[8];
#pragma unroll
        for (uint32_t j = 0; j < 8; j++) {
            asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(values[j].x), "=r"(values[j].y), "=r"(values[j].z), "=r"(values[j].w)
                         : "l"(from + i + j * step));
        }
#pragma unroll
        for (uint32_t j = 0; j < 8; j++) sum += values[j].x ^ values[j].y ^ values[j].z ^ values[j].w;
    }
    for (; i < count; i += step) {
        uint4 value = from[i];
        sum += value.x ^ value.y ^ value.z ^ value.w;
    }
    wait_for_inputs();
    // Never true of the sum of a buffer of equal words, but the compiler cannot know.
    if (sum == 0x9e3779b9) *out = sum;
}
