// Attention of any type and any dimension, with multiply-adds: for what no other kernel serves.
//
// A block has one row. Of a part of its keys, each thread computes a score, then sums of its dimensions.

#include "attention.cuh"
#include "primitives.cuh"

constexpr uint32_t THREADS = 128, WARPS = THREADS / 32;
constexpr uint32_t MOST_DIMS = 512; // host twin: in `any.rs`

// Of all threads' values, combined by `f` in the same order everywhere.
template <typename F>
__device__ __forceinline__ float of_block(float value, F f) {
    __shared__ float slots[WARPS];
#pragma unroll
    for (uint32_t lanes = 16; lanes > 0; lanes /= 2) value = f(value, __shfl_xor_sync(~0u, value, lanes));
    __syncthreads();
    if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = value;
    __syncthreads();
    value = slots[0];
    for (uint32_t i = 1; i < WARPS; i++) value = f(value, slots[i]);
    return value;
}

template <typename T>
__device__ __forceinline__ void attention_any(const Attention& args) {
    __shared__ float q[MOST_DIMS], weights[THREADS];
    const uint32_t head = blockIdx.y, sequence = blockIdx.z, row = blockIdx.x, dim = args.dim;
    launch_dependents();
    wait_for_inputs();
    const uint32_t position = args.position_of(sequence);
    const uint32_t begin = args.begin(position, row), end = args.end(position, row);
    const T* const from = static_cast<const T*>(args.q) + args.at(sequence, head, row, args.q_stride);
    for (uint32_t i = threadIdx.x; i < dim; i += THREADS) q[i] = to_f32(from[i]);
    __syncthreads();

    const T* const keys = args.keys<T>(sequence, head);
    const T* const values = args.values<T>(sequence, head);
    float most = -INFINITY, sum = 0.0f;
    float out[MOST_DIMS / THREADS] = {};
    for (uint32_t first = begin; first < end; first += THREADS) {
        const uint32_t count = min(THREADS, end - first);
        float score = -INFINITY;
        if (threadIdx.x < count) {
            const T* const key = keys + uint64_t(first + threadIdx.x) * dim;
            score = 0.0f;
            for (uint32_t i = 0; i < dim; i++) score = __fmaf_rn(q[i], to_f32(key[i]), score);
            score *= args.scale;
        }
        const float largest = fmaxf(most, of_block(score, [](float a, float b) { return fmaxf(a, b); }));
        const float factor = exp2_fast(most - reference(largest));
        most = largest;
        const float weight = exp2_fast(score - reference(largest));
        sum = __fmaf_rn(sum, factor, of_block(weight, [](float a, float b) { return a + b; }));
        weights[threadIdx.x] = weight;
        __syncthreads();
#pragma unroll
        for (uint32_t d = 0; d < MOST_DIMS / THREADS; d++) {
            const uint32_t i = d * THREADS + threadIdx.x;
            if (i >= dim) break;
            out[d] *= factor;
            for (uint32_t j = 0; j < count; j++) {
                out[d] = __fmaf_rn(weights[j], to_f32(values[uint64_t(first + j) * dim + i]), out[d]);
            }
        }
        __syncthreads();
    }
    T* const to = static_cast<T*>(args.out) + args.at(sequence, head, row, args.out_stride);
#pragma unroll
    for (uint32_t d = 0; d < MOST_DIMS / THREADS; d++) {
        const uint32_t i = d * THREADS + threadIdx.x;
        if (i < dim) to[i] = from_f32<T>(__fdiv_rn(out[d], sum));
    }
}

#define ANY(NAME, T)                                                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS) attention_any_##NAME(Attention args) {                       \
        attention_any<T>(args);                                                                                        \
    }

ANY(bf16, __nv_bfloat16)
ANY(f16, __half)
ANY(f32, float)
