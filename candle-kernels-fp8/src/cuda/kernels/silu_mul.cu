// silu(gate) * up, in f32, rounded once.

#include "rows.cuh"

// Host twin: `Input` in `silu_mul.rs`.
struct Input {
    const void* gate; // [m, k]
    const void* up;   // [m, k]
    uint64_t gate_stride, up_stride; // elements from row to row
};

// gate / (1 + e^-gate) * up. With e = e^-|gate| it is gate / (1 + e) or, below zero, gate * e / (1 + e): nothing
// overflows, and the divisor is between 1 and 2. Below -87.3, e is 0 instead of subnormal.
__device__ __forceinline__ float silu_mul(float gate, float up) {
    // Far out e is 0, but infinities would make NaN of the next lines.
    const float x = fminf(fabsf(gate), 1e4f);
    // 2^t misses e by what t was rounded by, and by what log2(e) was.
    const float t = __fmul_rn(x, -1.44269504f);
    const float rest = __fmaf_rn(x, -1.92596299e-8f, __fmaf_rn(x, -1.44269504f, -t));
    const float power = exp2_fast(t);
    const float e = __fmaf_rn(__fmul_rn(power, 0.693147181f), rest, power);
    const float above = gate < 0.0f ? __fmul_rn(gate, e) : gate;
    return __fmul_rn(__fmul_rn(above, reciprocal_fast(__fadd_rn(1.0f, e))), up);
}

template <typename T, uint32_t COUNT>
__device__ __forceinline__ void silu_mul(const Input& in, const Output& out) {
    Team team(out.shape);
    launch_dependents();
    wait_for_inputs();
    if (team.row >= out.m) return;
    const uint32_t first = team.first(), step = team.step(), end = out.k / PIECE;
    const T* const gate = static_cast<const T*>(in.gate) + team.row * in.gate_stride;
    const T* const up = static_cast<const T*>(in.up) + team.row * in.up_stride;
    Piece<T> gates[COUNT], ups[COUNT];
#pragma unroll
    for (uint32_t i = 0; i < COUNT; i++) {
        gates[i].clear();
        ups[i].clear();
        if (first + i * step < end) {
            gates[i].load(gate + uint64_t(first + i * step) * PIECE);
            ups[i].load(up + uint64_t(first + i * step) * PIECE);
        }
    }
#pragma unroll
    for (uint32_t i = 0; i < COUNT; i++) {
        float a[PIECE], b[PIECE];
        gates[i].widen(a);
        ups[i].widen(b);
#pragma unroll
        for (uint32_t j = 0; j < PIECE; j++) a[j] = silu_mul(a[j], b[j]);
        gates[i].round(a);
    }
    finish(out, team, gates);
}

// Any k and alignment.
template <typename T>
__device__ __forceinline__ void silu_mul_any(const Input& in, const Output& out) {
    Team team(out.shape);
    launch_dependents();
    wait_for_inputs();
    const T* const gate = static_cast<const T*>(in.gate) + team.row * in.gate_stride;
    const T* const up = static_cast<const T*>(in.up) + team.row * in.up_stride;
    finish_any<T>(out, team, [&](uint32_t i) { return rounded<T>(silu_mul(to_f32(gate[i]), to_f32(up[i]))); });
}

#define SILU_MUL(NAME, T)                                                                                              \
    extern "C" __global__ void __launch_bounds__(1024) silu_mul_##NAME##_1(Input in, Output out) {                     \
        silu_mul<T, 1>(in, out);                                                                                       \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(512) silu_mul_##NAME##_4(Input in, Output out) {                      \
        silu_mul<T, 4>(in, out);                                                                                       \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(512) silu_mul_##NAME##_any(Input in, Output out) {                    \
        silu_mul_any<T>(in, out);                                                                                      \
    }

SILU_MUL(bf16, __nv_bfloat16)
SILU_MUL(f16, __half)
SILU_MUL(f32, float)
