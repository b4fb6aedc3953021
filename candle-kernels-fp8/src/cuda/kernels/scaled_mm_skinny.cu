// Products with at most 16 rows of activations: bound by the bytes of the weight.
//
// A block owns ROWS output features; its warps share out K in chunks of 128. A lane copies 16 neighbouring codes of a weight
// row at a time into a ring in shared memory that is its own, so that nobody waits for anybody, and a warp has DEPTH chunks
// under way whatever its registers hold: four lanes take 64 bytes of a row, eight rows at once. Read back, they are what a
// lane gives to a tensor core instruction. The weight is the left factor, so that its rows fill the 16 rows of an
// instruction whatever m is; the activations of eight tokens are the right one. Codes are widened to half precision, which
// is exact, and which Hopper would do too for instructions of this size on codes.

#include <type_traits>

#include "mma.cuh"
#include "scaled_mm.cuh"
#include "shared.cuh"

constexpr uint32_t CHUNK = 128, PIECE = 64, DEPTH = 2;

// Sixteen codes, or sixteen activations, of a row, as an instruction takes them.
template <typename T>
struct Wide {
    uint32_t pairs[8];

    __device__ __forceinline__ void widen(const uint4& codes) {
        const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            pairs[2 * i] = widen2<T>(words[i]);
            pairs[2 * i + 1] = widen2<T>(words[i] >> 16);
        }
    }
};

// Sixteen activations of a token: codes, or values.
template <typename T>
struct Piece {
    uint4 words[sizeof(T)];

    __device__ __forceinline__ void load(const T* from, bool present) {
#pragma unroll
        for (uint32_t i = 0; i < sizeof(T); i++) {
            words[i] = present ? reinterpret_cast<const uint4*>(from)[i] : make_uint4(0, 0, 0, 0);
        }
    }
    template <typename W>
    __device__ __forceinline__ Wide<W> wide() const {
        Wide<W> wide;
        if constexpr (sizeof(T) == 1) {
            wide.widen(words[0]);
        } else {
#pragma unroll
            for (uint32_t i = 0; i < sizeof(T); i++) {
                wide.pairs[4 * i] = words[i].x, wide.pairs[4 * i + 1] = words[i].y;
                wide.pairs[4 * i + 2] = words[i].z, wide.pairs[4 * i + 3] = words[i].w;
            }
        }
        return wide;
    }
};

template <typename W>
__device__ __forceinline__ void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                    uint32_t b1) {
    if constexpr (std::is_same_v<W, __half>) {
        mma_f16(d, a0, a1, a2, a3, b0, b1);
    } else {
        mma_bf16(d, a0, a1, a2, a3, b0, b1);
    }
}

// T: type of the activations, uint8_t for codes. ROWS: 8 or 16 features. TILES: eights of tokens. BLOCK: scales change
// along K, at multiples of 128.
template <typename T, uint32_t ROWS, uint32_t TILES, bool BLOCK>
__device__ __forceinline__ void skinny(const ScaledMm& args) {
    using W = std::conditional_t<sizeof(T) == 1, __half, T>;
    constexpr uint32_t EIGHTS = ROWS / 8, PIECES = CHUNK / PIECE;
    extern __shared__ uint4 memory[];
    __shared__ float x_scales[TILES * 8];

    const uint32_t warp = threadIdx.x / 32, warps = blockDim.x / 32, lane = threadIdx.x % 32;
    const uint32_t g = lane / 4, t = lane % 4;
    const uint32_t first = blockIdx.x * ROWS;
    const uint32_t chunks = (args.k + CHUNK - 1) / CHUNK;
    uint4(&ring)[DEPTH][EIGHTS][PIECES][32] = reinterpret_cast<uint4(*)[DEPTH][EIGHTS][PIECES][32]>(memory)[warp];

    // Rows past the end repeat the last one: read, but never stored.
    auto weight_row = [&](uint32_t e) { return min(first + e * 8 + g, args.n - 1); };
    // In panels, rows past the end of the last one repeat those that are as far into it.
    const uint8_t* rows[EIGHTS];
#pragma unroll
    for (uint32_t e = 0; e < EIGHTS; e++) {
        const uint32_t eight = min(first + e * 8, (args.n - 1) / 8 * 8);
        rows[e] = weight_piece(args, args.panels ? eight + g : weight_row(e), t * 16);
    }
    static_assert(PIECE == 64);
    const uint32_t step = weight_step(args);
    const int32_t half_step = weight_half_step(args, g);
    auto copy_chunk = [&](uint32_t slot, uint32_t chunk) {
        if (chunk < chunks) {
#pragma unroll
            for (uint32_t p = 0; p < PIECES; p++) {
                const bool present = chunk * CHUNK + p * PIECE + t * 16 < args.k;
#pragma unroll
                for (uint32_t e = 0; e < EIGHTS; e++) {
                    const uint8_t* from = rows[e] + uint64_t(chunk) * step + int32_t(p) * half_step;
                    copy16(shared_address(&ring[slot][e][p][lane]), present ? from : args.weight, present ? 16 : 0);
                }
            }
        }
        copies_commit();
    };
#pragma unroll
    for (uint32_t d = 0; d < DEPTH; d++) copy_chunk(d, warp + d * warps);

    // In the end a thread stores results of one feature. What that takes is loaded now.
    const uint32_t feature = min(first + threadIdx.x % ROWS, args.n - 1);
    const float feature_scale = BLOCK ? 1.0f : weight_scale(args, feature, 0);
    launch_dependents();
    wait_for_inputs();

    // Activations of a chunk, and with BLOCK the scales of the rows and tokens of a lane's sums.
    struct Ahead {
        Piece<T> x[TILES][PIECES];
        float weight_scales[EIGHTS], x_scales[TILES][2];
    } ahead[2];
    auto load_ahead = [&](Ahead& to, uint32_t chunk) {
#pragma unroll
        for (uint32_t i = 0; i < TILES; i++) {
            const uint32_t token = i * 8 + g;
#pragma unroll
            for (uint32_t p = 0; p < PIECES; p++) {
                const uint32_t k = chunk * CHUNK + p * PIECE + t * 16;
                const T* from = static_cast<const T*>(args.x) + uint64_t(token) * args.x_stride + k;
                to.x[i][p].load(from, token < args.m && k < args.k);
            }
        }
        if constexpr (BLOCK) {
            const uint32_t k = min(chunk * CHUNK, args.k - 1);
#pragma unroll
            for (uint32_t e = 0; e < EIGHTS; e++) {
                to.weight_scales[e] = weight_scale(args, weight_row(e), k);
            }
#pragma unroll
            for (uint32_t i = 0; i < TILES * 2; i++) {
                const uint32_t token = min(i / 2 * 8 + t * 2 + i % 2, args.m - 1);
                to.x_scales[i / 2][i % 2] = args.x_scales ? x_scale(args, token, k) : 1.0f;
            }
        }
    };
    load_ahead(ahead[0], warp);
    if (!BLOCK && threadIdx.x < args.m) {
        x_scales[threadIdx.x] = args.x_scales ? x_scale(args, threadIdx.x, 0) : 1.0f;
    }

    float total[TILES][4] = {};
    auto multiply = [&](uint32_t slot, const Ahead& x) {
        // Sums leave the tensor cores every 64 products; two chains of them run at once.
        float parts[TILES][PIECES][4] = {};
#pragma unroll
        for (uint32_t p = 0; p < PIECES; p++) {
            Wide<W> low, high = {};
            low.widen(ring[slot][0][p][lane]);
            if constexpr (EIGHTS > 1) high.widen(ring[slot][1][p][lane]);
#pragma unroll
            for (uint32_t i = 0; i < TILES; i++) {
                const Wide<W> wide = x.x[i][p].template wide<W>();
#pragma unroll
                for (uint32_t j = 0; j < 8; j += 2) {
                    mma<W>(parts[i][p], low.pairs[j], high.pairs[j], low.pairs[j + 1], high.pairs[j + 1], wide.pairs[j],
                           wide.pairs[j + 1]);
                }
            }
        }
#pragma unroll
        for (uint32_t i = 0; i < TILES; i++) {
#pragma unroll
            for (uint32_t c = 0; c < 4; c++) {
                float part = parts[i][0][c] + parts[i][1][c];
                if constexpr (BLOCK) part *= x.x_scales[i][c % 2] * x.weight_scales[c / 2 % EIGHTS];
                total[i][c] += part;
            }
        }
    };
    for (uint32_t base = warp; base < chunks; base += DEPTH * warps) {
#pragma unroll
        for (uint32_t d = 0; d < DEPTH; d++) {
            const uint32_t chunk = base + d * warps;
            if (chunk >= chunks) break;
            load_ahead(ahead[(d + 1) % 2], chunk + warps);
            copies_wait<DEPTH - 1>();
            multiply(d, ahead[d % 2]);
            copy_chunk(d, chunk + DEPTH * warps);
        }
    }

    // The sums of a warp take the place of its ring.
    constexpr uint32_t STRIDE = sizeof(ring) / sizeof(float);
    float* const sums = reinterpret_cast<float*>(memory);
    copies_wait<0>();
    __syncwarp();
#pragma unroll
    for (uint32_t i = 0; i < TILES; i++) {
#pragma unroll
        for (uint32_t c = 0; c < 2 * EIGHTS; c++) {
            const uint32_t token = i * 8 + t * 2 + c % 2, row = c / 2 * 8 + g;
            sums[warp * STRIDE + token * ROWS + row] = total[i][c];
        }
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < args.m * ROWS; i += blockDim.x) {
        const uint32_t token = i / ROWS, row = first + i % ROWS;
        if (row >= args.n) continue;
        float sum = 0.0f;
        for (uint32_t w = 0; w < warps; w++) sum += sums[w * STRIDE + i];
        if constexpr (!BLOCK) sum *= x_scales[token] * feature_scale;
        store_result(args, token, row, sum);
    }
}

#define SKINNY(NAME, T, ROWS, TILES)                                                                                   \
    extern "C" __global__ void __launch_bounds__(4096 / ROWS) scaled_mm_skinny_##NAME##_##ROWS##x##TILES(                \
        const ScaledMm args) {                                                                                         \
        skinny<T, ROWS, TILES, false>(args);                                                                            \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(4096 / ROWS) scaled_mm_skinny_##NAME##_##ROWS##x##TILES##_block(        \
        const ScaledMm args) {                                                                                         \
        skinny<T, ROWS, TILES, true>(args);                                                                             \
    }

SKINNY(e4m3, uint8_t, 8, 1)
SKINNY(e4m3, uint8_t, 16, 1)
SKINNY(e4m3, uint8_t, 16, 2)
SKINNY(bf16, __nv_bfloat16, 8, 1)
SKINNY(bf16, __nv_bfloat16, 16, 1)
SKINNY(bf16, __nv_bfloat16, 16, 2)
SKINNY(f16, __half, 8, 1)
SKINNY(f16, __half, 16, 1)
SKINNY(f16, __half, 16, 2)
