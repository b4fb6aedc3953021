// RMS norm of rows, or of the sum of rows and a residual: weight * T(x / sqrt(mean(x^2) + eps)).

#include "rows.cuh"

// Host twin: `Input` in `rms_norm.rs`.
struct Input {
    const void* x;        // [m, k]
    const void* residual; // null or [m, k]
    void* sum;            // [m, k], receives T(x + residual); may be x or residual
    const void* weight;   // [k]
    uint64_t stride, residual_stride, sum_stride; // elements from row to row
    float eps;
};

// What values are multiplied with, from the sum of their squares.
__device__ __forceinline__ float root_of(float squares, const Input& in, const Output& out) {
    return __frcp_rn(__fsqrt_rn(__fadd_rn(__fdiv_rn(squares, float(out.k)), in.eps)));
}

template <typename T>
__device__ __forceinline__ float normalized(float x, float root, float weight) {
    return rounded<T>(__fmul_rn(rounded<T>(__fmul_rn(x, root)), weight));
}

template <typename T, uint32_t COUNT>
__device__ __forceinline__ void rms_norm(const Input& in, const Output& out) {
    Team team(out.shape);
    const T* const weight = static_cast<const T*>(in.weight);
    const uint32_t first = team.first(), step = team.step(), end = out.k / PIECE;
    Piece<T> weights[COUNT], pieces[COUNT];
    launch_dependents();
    // One piece of the weight is read ahead; with more, registers are better spent on more rows under way.
    if (COUNT == 1 && first < end) weights[0].load_as_constant(weight + uint64_t(first) * PIECE);
    wait_for_inputs();
    if (team.row >= out.m) return;

    // All reads are under way before the first is waited for.
    Piece<T> others[COUNT];
    if (in.residual) {
        const T* const residual = static_cast<const T*>(in.residual) + team.row * in.residual_stride;
#pragma unroll
        for (uint32_t i = 0; i < COUNT; i++) {
            if (first + i * step < end) others[i].load(residual + uint64_t(first + i * step) * PIECE);
        }
    }
    const T* const x = static_cast<const T*>(in.x) + team.row * in.stride;
#pragma unroll
    for (uint32_t i = 0; i < COUNT; i++) {
        pieces[i].clear();
        if (first + i * step < end) pieces[i].load(x + uint64_t(first + i * step) * PIECE);
    }
    if (in.residual) {
        T* const sum = static_cast<T*>(in.sum) + team.row * in.sum_stride;
#pragma unroll
        for (uint32_t i = 0; i < COUNT; i++) {
            if (first + i * step >= end) continue;
            float a[PIECE], b[PIECE];
            pieces[i].widen(a);
            others[i].widen(b);
#pragma unroll
            for (uint32_t j = 0; j < PIECE; j++) a[j] = __fadd_rn(a[j], b[j]);
            pieces[i].round(a);
            pieces[i].store(sum + uint64_t(first + i * step) * PIECE);
        }
    }
    float squares[4] = {};
#pragma unroll
    for (uint32_t i = 0; i < COUNT; i++) {
        float values[PIECE];
        pieces[i].widen(values);
#pragma unroll
        for (uint32_t j = 0; j < PIECE; j++) squares[j % 4] = __fmaf_rn(values[j], values[j], squares[j % 4]);
    }
    const float root = root_of(team.sum((squares[0] + squares[1]) + (squares[2] + squares[3])), in, out);
#pragma unroll
    for (uint32_t i = 0; i < COUNT; i++) {
        if (first + i * step >= end) continue;
        if (COUNT > 1) weights[i].load_as_constant(weight + uint64_t(first + i * step) * PIECE);
        float values[PIECE], by[PIECE];
        pieces[i].widen(values);
        weights[i].widen(by);
#pragma unroll
        for (uint32_t j = 0; j < PIECE; j++) values[j] = __fmul_rn(values[j], root);
        pieces[i].round(values);
        pieces[i].widen(values);
#pragma unroll
        for (uint32_t j = 0; j < PIECE; j++) values[j] = __fmul_rn(values[j], by[j]);
        pieces[i].round(values);
    }
    finish(out, team, pieces);
}

// Any k and alignment.
template <typename T>
__device__ __forceinline__ void rms_norm_any(const Input& in, const Output& out) {
    Team team(out.shape);
    launch_dependents();
    wait_for_inputs();
    const T* x = static_cast<const T*>(in.x) + team.row * in.stride;
    const T* const weight = static_cast<const T*>(in.weight);
    float squares = 0.0f;
    if (in.residual) {
        const T* const residual = static_cast<const T*>(in.residual) + team.row * in.residual_stride;
        T* const sum = static_cast<T*>(in.sum) + team.row * in.sum_stride;
        for (uint32_t i = team.thread; i < out.k; i += team.threads) {
            sum[i] = from_f32<T>(__fadd_rn(to_f32(x[i]), to_f32(residual[i])));
        }
        // Other threads read from it only behind the barrier of the sum of squares.
        x = sum;
    }
    for (uint32_t i = team.thread; i < out.k; i += team.threads) {
        squares = __fmaf_rn(to_f32(x[i]), to_f32(x[i]), squares);
    }
    const float root = root_of(team.sum(squares), in, out);
    finish_any<T>(out, team, [&](uint32_t i) { return normalized<T>(to_f32(x[i]), root, to_f32(weight[i])); });
}

#define RMS_NORM(NAME, T)                                                                                              \
    extern "C" __global__ void __launch_bounds__(1024) rms_norm_##NAME##_1(Input in, Output out) {                     \
        rms_norm<T, 1>(in, out);                                                                                       \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(512) rms_norm_##NAME##_4(Input in, Output out) {                      \
        rms_norm<T, 4>(in, out);                                                                                       \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(512) rms_norm_##NAME##_any(Input in, Output out) {                    \
        rms_norm_any<T>(in, out);                                                                                      \
    }

RMS_NORM(bf16, __nv_bfloat16)
RMS_NORM(f16, __half)
RMS_NORM(f32, float)
