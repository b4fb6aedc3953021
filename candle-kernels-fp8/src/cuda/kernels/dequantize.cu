// Codes and scales back to dense weights: the code times the scale, rounded to the scale's type, then to another.

#include "rows.cuh"

// Host twin: `Params` in `dequantize.rs`.
struct Dequantize {
    const uint8_t* codes; // [n, k]
    const float* scales;  // scale of (row, k): [row / scale_rows * scale_row + k / scale_run]
    void* out;            // [n, k], dense
    uint64_t stride;      // bytes from row to row of codes
    uint32_t k;
    uint32_t scale_rows, scale_row, scale_run;
    Float scale_float;
    uint32_t aligned; // rows of codes to 8 bytes, of results to 16
};

__device__ __forceinline__ float round_to(float value, Float type) {
    switch (type) {
    case BF16: return rounded<__nv_bfloat16>(value);
    case F16: return rounded<__half>(value);
    default: return value;
    }
}

// A block has a row.
template <typename T>
__device__ __forceinline__ void dequantize(const Dequantize& args) {
    launch_dependents();
    wait_for_inputs();
    const uint8_t* const codes = args.codes + blockIdx.x * args.stride;
    const float* const scales = args.scales + uint64_t(blockIdx.x / args.scale_rows) * args.scale_row;
    T* const out = static_cast<T*>(args.out) + uint64_t(blockIdx.x) * args.k;
    if (!args.aligned) {
        for (uint32_t i = threadIdx.x; i < args.k; i += blockDim.x) {
            out[i] = from_f32<T>(round_to(__fmul_rn(decode(codes[i]), scales[i / args.scale_run]), args.scale_float));
        }
        return;
    }
    const bool one_scale = args.scale_run >= args.k || args.scale_run % PIECE == 0;
#pragma unroll 4
    for (uint32_t piece = threadIdx.x; piece < args.k / PIECE; piece += blockDim.x) {
        const uint32_t i = piece * PIECE;
        float x[PIECE];
        decode8(*reinterpret_cast<const uint2*>(codes + i), x);
        if (one_scale) {
            const float scale = scales[i / args.scale_run];
#pragma unroll
            for (uint32_t j = 0; j < PIECE; j++) x[j] = __fmul_rn(x[j], scale);
        } else {
#pragma unroll
            for (uint32_t j = 0; j < PIECE; j++) x[j] = __fmul_rn(x[j], scales[(i + j) / args.scale_run]);
        }
#pragma unroll
        for (uint32_t j = 0; j < PIECE; j++) x[j] = round_to(x[j], args.scale_float);
        Piece<T> values;
        values.round(x);
        values.store(out + i);
    }
}

#define DEQUANTIZE(NAME, T)                                                                                            \
    extern "C" __global__ void __launch_bounds__(256) dequantize_##NAME(Dequantize args) { dequantize<T>(args); }

DEQUANTIZE(bf16, __nv_bfloat16)
DEQUANTIZE(f16, __half)
DEQUANTIZE(f32, float)
