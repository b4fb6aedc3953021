// E4M3 to other float types and back, elementwise.

#include "rows.cuh"

// Pieces that a thread has under way.
constexpr uint32_t DEPTH = 4;

// Saturates.
template <typename T>
__device__ __forceinline__ void encode(const T* from, uint8_t* to, uint64_t count, bool aligned) {
    launch_dependents();
    wait_for_inputs();
    const uint64_t pieces = aligned ? count / PIECE : 0;
    const uint64_t first = uint64_t(blockIdx.x) * blockDim.x * DEPTH + threadIdx.x;
    Piece<T> held[DEPTH];
#pragma unroll
    for (uint32_t i = 0; i < DEPTH; i++) {
        const uint64_t piece = first + i * blockDim.x;
        if (piece < pieces) held[i].load(from + piece * PIECE);
    }
#pragma unroll
    for (uint32_t i = 0; i < DEPTH; i++) {
        const uint64_t piece = first + i * blockDim.x;
        if (piece >= pieces) continue;
        float x[PIECE];
        held[i].widen(x);
        const uint2 codes = make_uint2(encode4(x[0], x[1], x[2], x[3]), encode4(x[4], x[5], x[6], x[7]));
        *reinterpret_cast<uint2*>(to + piece * PIECE) = codes;
    }
    const uint64_t step = uint64_t(gridDim.x) * blockDim.x;
    for (uint64_t i = pieces * PIECE + uint64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
        to[i] = encode2(to_f32(from[i]), 0.0f);
    }
}

template <typename T>
__device__ __forceinline__ void decode(const uint8_t* from, T* to, uint64_t count, bool aligned) {
    launch_dependents();
    wait_for_inputs();
    const uint64_t pieces = aligned ? count / PIECE : 0;
    const uint64_t first = uint64_t(blockIdx.x) * blockDim.x * DEPTH + threadIdx.x;
    uint2 held[DEPTH];
#pragma unroll
    for (uint32_t i = 0; i < DEPTH; i++) {
        const uint64_t piece = first + i * blockDim.x;
        if (piece < pieces) held[i] = *reinterpret_cast<const uint2*>(from + piece * PIECE);
    }
#pragma unroll
    for (uint32_t i = 0; i < DEPTH; i++) {
        const uint64_t piece = first + i * blockDim.x;
        if (piece >= pieces) continue;
        float x[PIECE];
        decode8(held[i], x);
        Piece<T> values;
        values.round(x);
        values.store(to + piece * PIECE);
    }
    const uint64_t step = uint64_t(gridDim.x) * blockDim.x;
    for (uint64_t i = pieces * PIECE + uint64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
        to[i] = from_f32<T>(decode(from[i]));
    }
}

#define CAST(NAME, T)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256) cast_##NAME##_to_e4m3(const T* from, uint8_t* to,                \
                                                                            uint64_t count, uint32_t aligned) {        \
        encode(from, to, count, aligned != 0);                                                                         \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256) cast_e4m3_to_##NAME(const uint8_t* from, T* to, uint64_t count,  \
                                                                          uint32_t aligned) {                          \
        decode(from, to, count, aligned != 0);                                                                         \
    }

CAST(bf16, __nv_bfloat16)
CAST(f16, __half)
CAST(f32, float)
