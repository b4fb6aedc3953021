// What every kernel uses: E4M3 codes, float types, dependent launches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

// Float types of activations and results; the numbers are those of `Float` in Rust.
enum Float : uint32_t { BF16 = 0, F16 = 1, F32 = 2 };

// Lets the next kernel of the stream start its prologue, if it was launched as a dependent one.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until all that earlier kernels wrote is visible. Returns at once if this one was not launched as a dependent one.
__device__ __forceinline__ void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Two codes, the lower one in the lower byte, as halves. Exact; NaN stays NaN.
__device__ __forceinline__ __half2 decode2(uint16_t codes) {
    uint32_t halves;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(codes));
    return *reinterpret_cast<__half2*>(&halves);
}

__device__ __forceinline__ float decode(uint8_t code) { return __low2float(decode2(code)); }

// Two codes of values rounded to nearest, ties to even, clamped to +-448; NaN stays NaN.
__device__ __forceinline__ uint16_t encode2(float low, float high) {
    uint16_t codes;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
    return codes;
}

__device__ __forceinline__ uint32_t encode4(float a, float b, float c, float d) {
    return uint32_t(encode2(a, b)) | uint32_t(encode2(c, d)) << 16;
}

__device__ __forceinline__ float to_f32(float value) { return value; }
__device__ __forceinline__ float to_f32(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_f32(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ __forceinline__ T from_f32(float value);
template <>
__device__ __forceinline__ float from_f32<float>(float value) { return value; }
template <>
__device__ __forceinline__ __half from_f32<__half>(float value) { return __float2half_rn(value); }
template <>
__device__ __forceinline__ __nv_bfloat16 from_f32<__nv_bfloat16>(float value) { return __float2bfloat16_rn(value); }

// An element of an array whose type is known at run time.
__device__ __forceinline__ float load_float(const void* array, uint64_t index, Float type) {
    switch (type) {
    case BF16: return to_f32(static_cast<const __nv_bfloat16*>(array)[index]);
    case F16: return to_f32(static_cast<const __half*>(array)[index]);
    default: return static_cast<const float*>(array)[index];
    }
}

__device__ __forceinline__ void store_float(void* array, uint64_t index, float value, Float type) {
    switch (type) {
    case BF16: static_cast<__nv_bfloat16*>(array)[index] = from_f32<__nv_bfloat16>(value); break;
    case F16: static_cast<__half*>(array)[index] = from_f32<__half>(value); break;
    default: static_cast<float*>(array)[index] = value;
    }
}

// Calls with a pointer to elements of an array's type, which is known at run time.
template <typename Call>
__device__ __forceinline__ void with_type(void* array, Float type, Call&& call) {
    switch (type) {
    case BF16: return call(static_cast<__nv_bfloat16*>(array));
    case F16: return call(static_cast<__half*>(array));
    default: return call(static_cast<float*>(array));
    }
}

template <typename T>
__device__ __forceinline__ void store_as(T* array, uint64_t index, float value) {
    array[index] = from_f32<T>(value);
}

// Two neighbours of a half-precision type, the first one in the lower half.
__device__ __forceinline__ uint32_t pack2(float low, float high, Float type) {
    if (type == BF16) {
        __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
        return *reinterpret_cast<uint32_t*>(&pair);
    }
    __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&pair);
}
