// Activations to E4M3.

#include "rows.cuh"

// Host twin: `Input` in `quantize.rs`.
struct Input {
    const void* x;          // [m, k]
    const float* magnitudes; // TENSOR: the largest of parts of x, NaN if one is
    uint64_t stride;        // elements from row to row
    uint32_t count;         // of magnitudes
};

// The scale of TENSOR, which one thread writes down.
__device__ __forceinline__ float scale_of_tensor(const Input& in, const Output& out, Team& team) {
    float most = 0.0f;
    for (uint32_t i = team.thread; i < in.count; i += team.threads) most = max_magnitude(most, in.magnitudes[i]);
    const float scale = scale_of(__uint_as_float(team.max(__float_as_uint(most))));
    if (team.row == 0 && team.first() == 0) *out.scales = scale;
    return scale;
}

template <typename T, uint32_t COUNT>
__device__ __forceinline__ void quantize(const Input& in, Output& out) {
    Team team(out.shape);
    launch_dependents();
    wait_for_inputs();
    if (team.row >= out.m) return;
    const T* const x = static_cast<const T*>(in.x) + team.row * in.stride;
    Piece<T> pieces[COUNT];
#pragma unroll
    for (uint32_t i = 0; i < COUNT; i++) {
        const uint32_t piece = team.first() + i * team.step();
        pieces[i].clear();
        if (piece < out.k / PIECE) pieces[i].load(x + uint64_t(piece) * PIECE);
    }
    if (out.mode == TENSOR) out.scale = scale_of_tensor(in, out, team);
    finish(out, team, pieces);
}

// Any k, alignment and group.
template <typename T>
__device__ __forceinline__ void quantize_any(const Input& in, Output& out) {
    Team team(out.shape);
    launch_dependents();
    wait_for_inputs();
    const T* const x = static_cast<const T*>(in.x) + team.row * in.stride;
    if (out.mode == TENSOR) out.scale = scale_of_tensor(in, out, team);
    finish_any<T>(out, team, [&](uint32_t i) { return to_f32(x[i]); });
}

// The largest magnitude of the rows that each block takes.
template <typename T>
__device__ __forceinline__ void amax(const T* x, uint64_t stride, uint32_t m, uint32_t k, bool aligned,
                                     float* magnitudes) {
    launch_dependents();
    wait_for_inputs();
    Team team(Shape{blockDim.x, 0, 1});
    float most = 0.0f;
    for (uint32_t row = blockIdx.x; row < m; row += gridDim.x) {
        const T* const values = x + row * stride;
        uint32_t i = threadIdx.x;
        if (aligned) {
#pragma unroll 4
            for (; i < k / PIECE; i += blockDim.x) {
                Piece<T> piece;
                piece.load(values + uint64_t(i) * PIECE);
                float wide[PIECE];
                piece.widen(wide);
                most = amax8(wide, most);
            }
            i = k / PIECE * PIECE + threadIdx.x;
        }
        for (; i < k; i += blockDim.x) most = max_magnitude(most, to_f32(values[i]));
    }
    const uint32_t result = team.max(__float_as_uint(most));
    if (threadIdx.x == 0) magnitudes[blockIdx.x] = __uint_as_float(result);
}

#define QUANTIZE(NAME, T)                                                                                              \
    extern "C" __global__ void __launch_bounds__(1024) quantize_##NAME##_1(Input in, Output out) {                     \
        quantize<T, 1>(in, out);                                                                                       \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(512) quantize_##NAME##_4(Input in, Output out) {                      \
        quantize<T, 4>(in, out);                                                                                       \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(512) quantize_##NAME##_any(Input in, Output out) {                    \
        quantize_any<T>(in, out);                                                                                      \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(512) quantize_##NAME##_amax(                                          \
        const void* x, uint64_t stride, uint32_t m, uint32_t k, uint32_t aligned, float* magnitudes) {                 \
        amax(static_cast<const T*>(x), stride, m, k, aligned != 0, magnitudes);                                        \
    }

QUANTIZE(bf16, __nv_bfloat16)
QUANTIZE(f16, __half)
QUANTIZE(f32, float)
