// Products on the tensor core instructions that every card since Ada has.
//
// A block computes a tile of FEATURES by TOKENS results. Asynchronous copies fill a ring of STAGES tiles of both
// operands, DEPTH deep along K. The weight is the left factor of the instructions: where activations are no codes, a
// warp expands its rows once, in registers, and uses them for all of its tokens. Which k the words of an instruction
// hold is free as long as both factors agree, so that codes go with activations of twice their size without
// rearrangement.

#include "mma.cuh"
#include "scaled_mm.cuh"
#include "tiles.cuh"

enum Scheme {
    ROW,      // scales of tokens and features; sums stay in the tensor cores' registers
    PROMOTED, // the same; sums of a step along K are added up outside of the tensor cores
    BLOCK,    // scales change along K, at multiples of DEPTH only
};

// Four codes as values of a half-precision type, exactly; NaN stays NaN.
__device__ __forceinline__ void widen4(uint32_t& low, uint32_t& high, uint32_t codes, __half) {
    asm("{ .reg .b16 a, b; mov.b32 {a, b}, %2; cvt.rn.f16x2.e4m3x2 %0, a; cvt.rn.f16x2.e4m3x2 %1, b; }"
        : "=r"(low), "=r"(high)
        : "r"(codes));
}
__device__ __forceinline__ void widen4(uint32_t& low, uint32_t& high, uint32_t codes, __nv_bfloat16) {
    uint32_t halves[2];
    widen4(halves[0], halves[1], codes, __half());
    const float2 a = __half22float2(*reinterpret_cast<__half2*>(&halves[0]));
    const float2 b = __half22float2(*reinterpret_cast<__half2*>(&halves[1]));
    low = pack2(a.x, a.y, BF16), high = pack2(b.x, b.y, BF16);
}

__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) {
    mma_f16(d, a[0], a[1], a[2], a[3], b0, b1);
}
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                         __nv_bfloat16) {
    mma_bf16(d, a[0], a[1], a[2], a[3], b0, b1);
}

// A warp's part of a tile of results: SETS of 16 features by EIGHTS of 8 tokens.
template <uint32_t SETS, uint32_t EIGHTS>
struct Sums {
    float d[SETS][EIGHTS][4];

    // Calls with the sum of feature 16 s + g + c / 2 * 8 and token 8 e + 2 t + c % 2, for all s, e and c.
    template <typename F>
    __device__ __forceinline__ void each(F f) {
#pragma unroll
        for (uint32_t s = 0; s < SETS; s++) {
#pragma unroll
            for (uint32_t e = 0; e < EIGHTS; e++) {
#pragma unroll
                for (uint32_t c = 0; c < 4; c++) f(d[s][e][c], s, e, c);
            }
        }
    }
    __device__ __forceinline__ void clear() {
        each([](float& sum, uint32_t, uint32_t, uint32_t) { sum = 0.0f; });
    }
    // Adds sixteen products to each sum: those of a word of codes of both rows of a set with two words of type T.
    template <typename T>
    __device__ __forceinline__ void add_expanded(const uint32_t (&weights)[SETS][2], const uint32_t (&x)[EIGHTS][2]) {
#pragma unroll
        for (uint32_t s = 0; s < SETS; s++) {
            uint32_t a[4];
            widen4(a[0], a[2], weights[s][0], T());
            widen4(a[1], a[3], weights[s][1], T());
#pragma unroll
            for (uint32_t e = 0; e < EIGHTS; e++) multiply(d[s][e], a, x[e][0], x[e][1], T());
        }
    }
};

// Activations of type T. A lane reads 16 neighbouring codes of a row of the weight, and the 16 activations they meet.
template <typename T>
struct Operands {
    static constexpr uint32_t DEPTH = 128 / sizeof(T);
    using Weights = Tile<DEPTH, 1>;
    using X = Tile<128, 8>;

    // Adds the products of a step. The addresses are those of the lane's row of the warp's first rows.
    template <uint32_t SETS, uint32_t EIGHTS>
    __device__ static __forceinline__ void step(Sums<SETS, EIGHTS>& sums, const uint8_t* weights, const uint8_t* x) {
        const uint32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        uint32_t w[SETS][2][4];
#pragma unroll
        for (uint32_t s = 0; s < SETS; s++) {
            read16(w[s][0], weights + s * 16 * DEPTH + Weights::place(g, t));
            read16(w[s][1], weights + (s * 16 + 8) * DEPTH + Weights::place(g, t));
        }
#pragma unroll
        for (uint32_t half = 0; half < 2; half++) {
            uint32_t values[EIGHTS][4];
#pragma unroll
            for (uint32_t e = 0; e < EIGHTS; e++) read16(values[e], x + e * 8 * 128 + X::place(g, 2 * t + half));
#pragma unroll
            for (uint32_t word = 0; word < 2; word++) {
                uint32_t a[SETS][2], b[EIGHTS][2];
#pragma unroll
                for (uint32_t s = 0; s < SETS; s++) {
                    a[s][0] = w[s][0][2 * half + word];
                    a[s][1] = w[s][1][2 * half + word];
                }
#pragma unroll
                for (uint32_t e = 0; e < EIGHTS; e++) {
                    b[e][0] = values[e][2 * word];
                    b[e][1] = values[e][2 * word + 1];
                }
                sums.template add_expanded<T>(a, b);
            }
        }
    }
};

// Activations that are codes.
template <>
struct Operands<uint8_t> {
    static constexpr uint32_t DEPTH = 128;
    using Weights = Tile<DEPTH, 8>;
    using X = Tile<DEPTH, 8>;

    template <uint32_t SETS, uint32_t EIGHTS>
    __device__ static __forceinline__ void step(Sums<SETS, EIGHTS>& sums, const uint8_t* weights, const uint8_t* x) {
        const uint32_t lane = threadIdx.x % 32;
#pragma unroll
        for (uint32_t k = 0; k < 4; k++) {
            uint32_t w[SETS][4], codes[EIGHTS / 2][4];
#pragma unroll
            for (uint32_t s = 0; s < SETS; s++) {
                read_matrices(w[s], weights + s * 16 * DEPTH + Weights::place(lane % 16, 2 * k + lane / 16));
            }
#pragma unroll
            for (uint32_t e = 0; e < EIGHTS / 2; e++) {
                const uint32_t row = lane / 16 * 8 + lane % 8;
                read_matrices(codes[e], x + e * 16 * DEPTH + X::place(row, 2 * k + lane / 8 % 2));
            }
#pragma unroll
            for (uint32_t s = 0; s < SETS; s++) {
#pragma unroll
                for (uint32_t e = 0; e < EIGHTS; e++) {
                    const uint32_t* b = codes[e / 2] + e % 2 * 2;
                    mma_e4m3(sums.d[s][e], w[s][0], w[s][1], w[s][2], w[s][3], b[0], b[1]);
                }
            }
        }
    }
};

// Which tile of results a block computes. Blocks that run at the same time share operands in the second-level cache:
// GROUP tiles of tokens go along the features together.
struct Place {
    uint32_t feature, token;

    __device__ __forceinline__ Place(uint32_t features, uint32_t tokens, const ScaledMm& args) {
        constexpr uint32_t GROUP = 8;
        const uint32_t across = (args.n + features - 1) / features, down = (args.m + tokens - 1) / tokens;
        const uint32_t first = blockIdx.x / (GROUP * across) * GROUP, within = blockIdx.x % (GROUP * across);
        const uint32_t high = min(down - first, GROUP);
        feature = within / high * features;
        token = (first + within % high) * tokens;
    }
};

// Four neighbouring results of a token.
__device__ __forceinline__ void store_results(const ScaledMm& args, uint32_t token, uint32_t feature,
                                              const float (&results)[4]) {
    const uint64_t at = uint64_t(token) * args.n + feature;
    if (args.n % 4) {
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            if (feature + i < args.n) store_float(args.out, at + i, results[i], args.out_float);
        }
    } else if (feature >= args.n) {
        return;
    } else if (args.out_float == F32) {
        *reinterpret_cast<float4*>(static_cast<float*>(args.out) + at) =
            make_float4(results[0], results[1], results[2], results[3]);
    } else {
        *reinterpret_cast<uint2*>(static_cast<__half*>(args.out) + at) = make_uint2(
            pack2(results[0], results[1], args.out_float), pack2(results[2], results[3], args.out_float));
    }
}

// WARPS_N by WARPS_M warps share out a tile.
template <typename T, uint32_t FEATURES, uint32_t TOKENS, uint32_t WARPS_N, uint32_t WARPS_M, uint32_t STAGES,
          Scheme SCHEME>
__device__ __forceinline__ void mma(const ScaledMm& args) {
    using Operands = Operands<T>;
    constexpr uint32_t DEPTH = Operands::DEPTH, THREADS = WARPS_N * WARPS_M * 32;
    constexpr uint32_t SETS = FEATURES / WARPS_N / 16, EIGHTS = TOKENS / WARPS_M / 8;
    // A stage: weights, activations, a scale for each of the features and of the tokens.
    constexpr uint32_t X_AT = FEATURES * DEPTH, SCALES_AT = X_AT + TOKENS * 128;
    constexpr uint32_t STAGE = SCALES_AT + (SCHEME == BLOCK ? (FEATURES + TOKENS) * 4 : 0);
    extern __shared__ __align__(128) uint8_t shared[];

    const Place place(FEATURES, TOKENS, args);
    const uint32_t warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const uint32_t warp_n = warp % WARPS_N * SETS * 16, warp_m = warp / WARPS_N * EIGHTS * 8;
    const uint32_t steps = (args.k + DEPTH - 1) / DEPTH;

    // The scales of the row that this thread copies the scales of.
    const float* scales = nullptr;
    uint32_t scale_run = 1;
    if constexpr (SCHEME == BLOCK) {
        static_assert(FEATURES + TOKENS <= THREADS);
        if (threadIdx.x < FEATURES) {
            const uint32_t feature = min(place.feature + threadIdx.x, args.n - 1);
            scales = args.weight_scales + uint64_t(feature / args.weight_scale_rows) * args.weight_scale_row;
            scale_run = args.weight_scale_run;
        } else if (args.x_scales && threadIdx.x < FEATURES + TOKENS) {
            const uint32_t token = min(place.token + threadIdx.x - FEATURES, args.m - 1);
            scales = args.x_scales + uint64_t(token) * args.x_scale_row;
            scale_run = args.x_scale_run;
        }
    }
    const uint32_t ring = shared_address(shared);
    using Weights = typename Operands::Weights;
    using X = typename Operands::X;
    // What this thread copies of the first step.
    const uint32_t own_row = place.feature + Weights::own_row();
    const uint8_t* const first_piece = weight_piece(args, own_row, Weights::own_byte());
    const uint32_t weight_step = ::weight_step(args);
    const int32_t half_step = weight_half_step(args, own_row);
    auto copy_weights = [&](uint32_t stage, uint32_t step) {
        const uint32_t k = step * DEPTH;
        const uint8_t* from = first_piece + uint64_t(k / ATOM_CODES) * weight_step;
        if (k % ATOM_CODES) from += half_step;
        Weights::template copy<FEATURES, THREADS>(ring + stage * STAGE, from, args.weight_stride,
                                                  args.n - place.feature, args.k - k);
    };
    auto copy_x = [&](uint32_t stage, uint32_t step) {
        const uint32_t to = ring + stage * STAGE;
        const uint64_t stride = uint64_t(args.x_stride) * sizeof(T);
        const uint8_t* from = static_cast<const uint8_t*>(args.x) + (place.token + X::own_row()) * stride;
        X::template copy<TOKENS, THREADS>(to + X_AT, from + step * 128 + X::own_byte(), stride, args.m - place.token,
                                          args.k * sizeof(T) - step * 128);
        if (SCHEME == BLOCK && scales) copy4(to + SCALES_AT + threadIdx.x * 4, scales + step * DEPTH / scale_run);
    };

    launch_dependents();
#pragma unroll
    for (uint32_t i = 0; i < STAGES - 1; i++) {
        if (i < steps) copy_weights(i, i);
    }
    wait_for_inputs();
#pragma unroll
    for (uint32_t i = 0; i < STAGES - 1; i++) {
        if (i < steps) copy_x(i, i);
        copies_commit();
    }

    Sums<SETS, EIGHTS> total;
    total.clear();
    uint32_t stage = 0, free_stage = STAGES - 1;
    for (uint32_t step = 0; step < steps; step++) {
        copies_wait<STAGES - 2>();
        __syncthreads(); // all have this step's tiles, and have used up those of the step before
        if (step + STAGES - 1 < steps) {
            copy_weights(free_stage, step + STAGES - 1);
            copy_x(free_stage, step + STAGES - 1);
        }
        copies_commit();

        const uint8_t* tiles = shared + stage * STAGE;
        const uint8_t *weights = tiles + warp_n * DEPTH, *x = tiles + X_AT + warp_m * 128;
        if constexpr (SCHEME == ROW) {
            Operands::step(total, weights, x);
        } else {
            Sums<SETS, EIGHTS> part;
            part.clear();
            Operands::step(part, weights, x);
            if constexpr (SCHEME == PROMOTED) {
                part.each([&](float sum, uint32_t s, uint32_t e, uint32_t c) { total.d[s][e][c] += sum; });
            } else {
                const float* scale = reinterpret_cast<const float*>(tiles + SCALES_AT);
                part.each([&](float sum, uint32_t s, uint32_t e, uint32_t c) {
                    float product = scale[warp_n + s * 16 + c / 2 * 8 + g];
                    if (args.x_scales) product *= scale[FEATURES + warp_m + e * 8 + t * 2 + c % 2];
                    total.d[s][e][c] = fmaf(sum, product, total.d[s][e][c]);
                });
            }
        }
        free_stage = stage;
        stage = stage + 1 == STAGES ? 0 : stage + 1;
    }

    // Results pass through shared memory, the tokens of a row of warps at a time, so that whole rows are stored. A
    // thread has the same four features all the time.
    constexpr uint32_t STRIDE = FEATURES + 4, QUADS = FEATURES / 4;
    static_assert(TOKENS / WARPS_M * STRIDE * 4 <= STAGES * STAGE && THREADS % QUADS == 0);
    float* sums = reinterpret_cast<float*>(shared);
    const uint32_t quad = threadIdx.x % QUADS * 4, feature = place.feature + quad;
    float scale[4], bias[4];
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) {
        const uint32_t col = min(feature + i, args.n - 1);
        scale[i] = SCHEME == BLOCK ? 1.0f : weight_scale(args, col, 0);
        bias[i] = args.bias ? load_float(args.bias, col, args.bias_float) : 0.0f;
    }
    for (uint32_t pass = 0; pass < WARPS_M; pass++) {
        __syncthreads();
        if (warp / WARPS_N == pass) {
            total.each([&](float sum, uint32_t s, uint32_t e, uint32_t c) {
                sums[(e * 8 + t * 2 + c % 2) * STRIDE + warp_n + s * 16 + c / 2 * 8 + g] = sum;
            });
        }
        __syncthreads();
        for (uint32_t row = threadIdx.x / QUADS; row < TOKENS / WARPS_M; row += THREADS / QUADS) {
            const uint32_t token = place.token + pass * (TOKENS / WARPS_M) + row;
            if (token >= args.m) break;
            const float x = SCHEME == BLOCK || !args.x_scales ? 1.0f : x_scale(args, token, 0);
            const float4 four = *reinterpret_cast<const float4*>(sums + row * STRIDE + quad);
            float results[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
            for (uint32_t i = 0; i < 4; i++) results[i] = fmaf(results[i], x * scale[i], bias[i]);
            store_results(args, token, feature, results);
        }
    }
}

#define MMA(NAME, T, FEATURES, TOKENS, WARPS_N, WARPS_M, STAGES, SCHEME, SUFFIX)                                       \
    extern "C" __global__ void __launch_bounds__(WARPS_N* WARPS_M * 32, 1)                                             \
        scaled_mm_mma_##NAME##_##FEATURES##x##TOKENS##SUFFIX(const ScaledMm args) {                                    \
        mma<T, FEATURES, TOKENS, WARPS_N, WARPS_M, STAGES, SCHEME>(args);                                              \
    }

// Stages are as many as fit the 99 KiB that a block has on Ada, or as help.
MMA(e4m3, uint8_t, 128, 128, 4, 2, 3, ROW, _fast)
MMA(e4m3, uint8_t, 128, 128, 4, 2, 3, PROMOTED, )
MMA(e4m3, uint8_t, 128, 128, 4, 2, 3, BLOCK, _block)
MMA(e4m3, uint8_t, 64, 64, 2, 2, 5, PROMOTED, )
MMA(e4m3, uint8_t, 64, 64, 2, 2, 5, BLOCK, _block)
MMA(e4m3, uint8_t, 64, 32, 4, 1, 6, PROMOTED, )
MMA(e4m3, uint8_t, 64, 32, 4, 1, 6, BLOCK, _block)

#define MMA_HALF(NAME, T)                                                                                              \
    MMA(NAME, T, 256, 128, 4, 2, 3, ROW, )                                                                             \
    MMA(NAME, T, 128, 128, 4, 2, 4, ROW, )                                                                             \
    MMA(NAME, T, 128, 128, 4, 2, 3, BLOCK, _block)                                                                     \
    MMA(NAME, T, 64, 64, 2, 2, 6, ROW, )                                                                               \
    MMA(NAME, T, 64, 64, 2, 2, 6, BLOCK, _block)                                                                       \
    MMA(NAME, T, 64, 32, 4, 1, 6, ROW, )                                                                               \
    MMA(NAME, T, 64, 32, 4, 1, 6, BLOCK, _block)

MMA_HALF(bf16, __nv_bfloat16)
MMA_HALF(f16, __half)
