// Few rows of activations: bound by reading the weight. A SIMD group computes FEATURES results of each of TOKENS rows; its
// threads share out K in pieces of 16 bytes of the weight.

template <typename T, uint TOKENS, uint FEATURES>
inline void gemv(constant ScaledMm& args, device const T* x, device const e4m3* weight, Scales scales,
                 device const uchar* bias, device uchar* out, uint first, uint lane) {
    float totals[TOKENS][FEATURES] = {};
    for (uint k = lane * PIECE; k < args.k; k += LANES * PIECE) {
        float weights[FEATURES][PIECE];
        for (uint j = 0; j < FEATURES; j++) {
            // Those past the last are not stored: any row will do.
            const uint col = min(first + j, args.n - 1);
            load(weight + ulong(col) * args.weight_stride, k, args.k, args.aligned != 0, weights[j]);
        }
        const uint piece_end = min(k + PIECE, args.k);
        for (uint i = 0; i < TOKENS; i++) {
            const uint row = min(i, args.m - 1);
            float values[PIECE];
            load(x + ulong(row) * args.x_stride, k, args.k, args.aligned != 0, values);
            for (uint start = k; start < piece_end;) {
                const uint end = min(run_end(args, start), piece_end);
                for (uint j = 0; j < FEATURES; j++) {
                    float sum = 0.0f;
                    if (end - start == PIECE) {
                        for (uint l = 0; l < PIECE; l++) sum = fma(values[l], weights[j][l], sum);
                    } else {
                        for (uint l = start - k; l < end - k; l++) sum = fma(values[l], weights[j][l], sum);
                    }
                    const uint col = min(first + j, args.n - 1);
                    totals[i][j] = fma(sum, scales.of(args, row, col, start), totals[i][j]);
                }
                start = end;
            }
        }
    }
    for (uint i = 0; i < TOKENS; i++) {
        for (uint j = 0; j < FEATURES; j++) {
            const float total = simd_sum(totals[i][j]);
            if (lane == 0 && i < args.m && first + j < args.n) store_result(args, bias, out, i, first + j, total);
        }
    }
}

#define GEMV(NAME, T, TOKENS, FEATURES)                                                                                \
    kernel void scaled_mm_gemv_##NAME##_##TOKENS(PRODUCT(T)) {                                                         \
        const uint first = (group * (threads / LANES) + simd) * FEATURES;                                              \
        gemv<T, TOKENS, FEATURES>(args, x, weight, Scales{x_scales, weight_scales}, bias, out, first, lane);           \
    }

// As many features as `Gemv::features` in `scaled_mm.rs` says.
#define GEMVS(NAME, T)                                                                                                 \
    GEMV(NAME, T, 1, 4)                                                                                                \
    GEMV(NAME, T, 2, 4)                                                                                                \
    GEMV(NAME, T, 4, 2)                                                                                                \
    GEMV(NAME, T, 8, 2)

GEMVS(e4m3, e4m3)
GEMVS(bf16, bf16)
GEMVS(f16, half)
GEMVS(f32, float)
