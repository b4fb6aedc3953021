// Tensor core products of one warp: D[16, 8] += A[16, K] * B[K, 8], sums in f32.
//
// Lane 4 g + t holds, of A, row g (words 0 and 2) and row g + 8 (words 1 and 3); of B, column g; of D, columns 2 t and
// 2 t + 1 of row g (0, 1) and of row g + 8 (2, 3). Which k a word holds is free as long as A and B agree.
#pragma once

#include "common.cuh"

// K = 32: a word is four E4M3 codes.
__device__ __forceinline__ void mma_e4m3(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                         uint32_t b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// K = 16: a word is two values.
__device__ __forceinline__ void mma_bf16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                         uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_f16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                        uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Two codes as two values of a half-precision type, exactly; NaN stays NaN.
template <typename T>
__device__ __forceinline__ uint32_t widen2(uint16_t codes);
template <>
__device__ __forceinline__ uint32_t widen2<__half>(uint16_t codes) {
    __half2 pair = decode2(codes);
    return *reinterpret_cast<uint32_t*>(&pair);
}
template <>
__device__ __forceinline__ uint32_t widen2<__nv_bfloat16>(uint16_t codes) {
    float2 pair = __half22float2(decode2(codes));
    return pack2(pair.x, pair.y, BF16);
}
