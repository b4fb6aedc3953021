// Few rows of activations: bound by reading the weight. A SIMD group computes FEATURES results of each of TOKENS rows;
// its threads share out K in pieces of 16 bytes of the weight.

// Where no scale changes along K, it is applied once; else to each piece, or to each part of one with a scale of its
// own.
template <typename T, uint TOKENS, uint FEATURES, bool ROW_WISE>
inline void gemv(constant ScaledMm& args, device const T* x, device const e4m3* weight, Scales scales,
                 device const uchar* bias, device uchar* out, uint first, uint lane) {
    const bool aligned = args.aligned != 0;
    float totals[TOKENS][FEATURES] = {};
    for (uint k = lane * PIECE; k < args.k; k += LANES * PIECE) {
        float weights[FEATURES][PIECE];
        for (uint j = 0; j < FEATURES; j++) {
            // Those past the last are not stored: any row will do.
            const uint col = min(first + j, args.n - 1);
            load(weight + ulong(col) * args.weight_stride, k, args.k, aligned, weights[j]);
        }
        for (uint i = 0; i < TOKENS; i++) {
            const uint row = min(i, args.m - 1);
            float values[PIECE];
            load(x + ulong(row) * args.x_stride, k, args.k, aligned, values);
            if (ROW_WISE) {
                for (uint j = 0; j < FEATURES; j++) {
                    for (uint l = 0; l < PIECE; l++) totals[i][j] = fma(values[l], weights[j][l], totals[i][j]);
                }
                continue;
            }
            const uint piece_end = min(k + PIECE, args.k);
            for (uint start = k; start < piece_end;) {
                const uint end = min(run_end(args, start), piece_end);
                for (uint j = 0; j < FEATURES; j++) {
                    float sum = 0.0f;
                    for (uint l = 0; l < PIECE; l++) {
                        // Indices that the compiler knows keep values in registers.
                        if (k + l >= start && k + l < end) sum = fma(values[l], weights[j][l], sum);
                    }
                    const float scale = scales.of(args, row, min(first + j, args.n - 1), start);
                    totals[i][j] = fma(sum, scale, totals[i][j]);
                }
                start = end;
            }
        }
    }
    for (uint i = 0; i < TOKENS; i++) {
        for (uint j = 0; j < FEATURES; j++) {
            const float total = simd_sum(totals[i][j]);
            const uint col = first + j;
            if (lane == 0 && i < args.m && col < args.n) {
                store_result(args, bias, out, i, col, ROW_WISE ? total * scales.of(args, i, col, 0) : total);
            }
        }
    }
}

#define GEMV(NAME, T, TOKENS, FEATURES, ROW_WISE)                                                                      \
    kernel void NAME##_##TOKENS(PRODUCT(T)) {                                                                          \
        const uint first = (group * (threads / LANES) + simd) * FEATURES;                                              \
        const Scales scales{x_scales, weight_scales};                                                                  \
        gemv<T, TOKENS, FEATURES, ROW_WISE>(args, x, weight, scales, bias, out, first, lane);                          \
    }

// As many features as `Kernel::features` in `scaled_mm.rs` says.
#define GEMVS(NAME, T, ROW_WISE)                                                                                       \
    GEMV(NAME, T, 1, 4, ROW_WISE)                                                                                      \
    GEMV(NAME, T, 2, 4, ROW_WISE)                                                                                      \
    GEMV(NAME, T, 4, 2, ROW_WISE)                                                                                      \
    GEMV(NAME, T, 8, 2, ROW_WISE)

GEMVS(scaled_mm_gemv_e4m3, e4m3, true)
GEMVS(scaled_mm_gemv_bf16, bf16, true)
GEMVS(scaled_mm_gemv_f16, half, true)
GEMVS(scaled_mm_gemv_f32, float, true)
GEMVS(scaled_mm_gemv_block_e4m3, e4m3, false)
GEMVS(scaled_mm_gemv_block_bf16, bf16, false)
GEMVS(scaled_mm_gemv_block_f16, half, false)
GEMVS(scaled_mm_gemv_block_f32, float, false)
