// Products with at most 16 rows of activations: bound by the bytes of the weight.
//
// A block owns ROWS output features; its warps share out K in chunks of 128. A lane reads 16 neighbouring codes of a weight
// row at a time, straight into the registers that a tensor core instruction takes: four lanes read 64 bytes of a row, eight
// rows at once. The weight is the left factor, so that its rows fill the 16 rows of an instruction whatever m is; the
// activations of eight tokens are the right one. All loads of a warp's first DEPTH chunks are under way before the first
// product, and a chunk's registers are refilled as soon as they are used.

#include <type_traits>

#include "mma.cuh"
#include "scaled_mm.cuh"

constexpr uint32_t CHUNK = 128;

// 16 bytes that no other block reads.
__device__ __forceinline__ uint4 load_once(const uint8_t* address) {
    uint4 value;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(address));
    return value;
}

__device__ __forceinline__ uint4 load_shared_by_all(const void* address) {
    uint4 value;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(address));
    return value;
}

template <typename T>
__device__ __forceinline__ void mma_wide(float (&d)[4], uint32_t low, uint32_t high, uint32_t b0, uint32_t b1) {
    uint32_t a0 = widen2<T>(low), a1 = widen2<T>(high), a2 = widen2<T>(low >> 16), a3 = widen2<T>(high >> 16);
    if constexpr (std::is_same_v<T, __half>) {
        mma_f16(d, a0, a1, a2, a3, b0, b1);
    } else {
        mma_bf16(d, a0, a1, a2, a3, b0, b1);
    }
}

// Sixteen activations of a token, to be multiplied by sixteen weights of two rows.
template <typename T>
struct Piece {
    uint4 x[2];

    __device__ __forceinline__ void load(const void* row, uint32_t k) {
        const T* from = static_cast<const T*>(row) + k;
        x[0] = load_shared_by_all(from);
        x[1] = load_shared_by_all(from + 8);
    }
    __device__ __forceinline__ void clear() { x[0] = x[1] = make_uint4(0, 0, 0, 0); }
    __device__ __forceinline__ void multiply(float (&d)[4], const uint4& low, const uint4& high) const {
        mma_wide<T>(d, low.x, high.x, x[0].x, x[0].y);
        mma_wide<T>(d, low.y, high.y, x[0].z, x[0].w);
        mma_wide<T>(d, low.z, high.z, x[1].x, x[1].y);
        mma_wide<T>(d, low.w, high.w, x[1].z, x[1].w);
    }
};

template <>
struct Piece<uint8_t> {
    uint4 x;

    __device__ __forceinline__ void load(const void* row, uint32_t k) {
        x = load_shared_by_all(static_cast<const uint8_t*>(row) + k);
    }
    __device__ __forceinline__ void clear() { x = make_uint4(0, 0, 0, 0); }
    __device__ __forceinline__ void multiply(float (&d)[4], const uint4& low, const uint4& high) const {
        mma_e4m3(d, low.x, high.x, low.y, high.y, x.x, x.y);
        mma_e4m3(d, low.z, high.z, low.w, high.w, x.z, x.w);
    }
};

// ROWS: 8, 16 or 32 features; TILES: eights of tokens; BLOCK: scales change at multiples of 128 along K.
template <typename T, uint32_t ROWS, uint32_t TILES, uint32_t DEPTH, bool BLOCK>
__device__ __forceinline__ void skinny(const ScaledMm& args) {
    constexpr uint32_t SETS = ROWS <= 16 ? 1 : ROWS / 16; // of 16 rows
    constexpr uint32_t EIGHTS = ROWS / 8 / SETS;          // in a set
    extern __shared__ float sums[];                       // [warps][TILES * 8][ROWS]

    const uint32_t warp = threadIdx.x / 32, warps = blockDim.x / 32, lane = threadIdx.x % 32;
    const uint32_t g = lane / 4, t = lane % 4;
    const uint32_t first = blockIdx.x * ROWS;
    const uint32_t chunks = (args.k + CHUNK - 1) / CHUNK;

    const uint8_t* rows[SETS][EIGHTS];
    for (uint32_t s = 0; s < SETS; s++) {
        for (uint32_t e = 0; e < EIGHTS; e++) {
            // Rows past the end repeat the last one: read, but never stored.
            uint32_t row = min(first + s * 16 + e * 8 + g, args.n - 1);
            rows[s][e] = args.weight + uint64_t(row) * args.weight_stride;
        }
    }
    const T* x_rows[TILES];
    bool present[TILES];
    for (uint32_t i = 0; i < TILES; i++) {
        present[i] = i * 8 + g < args.m;
        x_rows[i] = static_cast<const T*>(args.x) + uint64_t(present[i] ? i * 8 + g : 0) * args.x_stride;
    }

    uint4 weights[DEPTH][SETS][EIGHTS][2];
    Piece<T> x[DEPTH][TILES][2];
    auto load_weights = [&](uint32_t d, uint32_t chunk) {
#pragma unroll
        for (uint32_t p = 0; p < 2; p++) {
            uint32_t k = chunk * CHUNK + p * 64 + t * 16;
#pragma unroll
            for (uint32_t s = 0; s < SETS; s++) {
#pragma unroll
                for (uint32_t e = 0; e < EIGHTS; e++) {
                    weights[d][s][e][p] = k < args.k ? load_once(rows[s][e] + k) : make_uint4(0, 0, 0, 0);
                }
            }
        }
    };
    auto load_x = [&](uint32_t d, uint32_t chunk) {
#pragma unroll
        for (uint32_t p = 0; p < 2; p++) {
            uint32_t k = chunk * CHUNK + p * 64 + t * 16;
#pragma unroll
            for (uint32_t i = 0; i < TILES; i++) {
                if (present[i] && k < args.k) {
                    x[d][i][p].load(x_rows[i], k);
                } else {
                    x[d][i][p].clear();
                }
            }
        }
    };

#pragma unroll
    for (uint32_t d = 0; d < DEPTH; d++) {
        if (warp + d * warps < chunks) load_weights(d, warp + d * warps);
    }
    launch_dependents();
    wait_for_inputs();
#pragma unroll
    for (uint32_t d = 0; d < DEPTH; d++) {
        if (warp + d * warps < chunks) load_x(d, warp + d * warps);
    }

    float total[SETS][TILES][4] = {};
    for (uint32_t base = warp; base < chunks; base += DEPTH * warps) {
#pragma unroll
        for (uint32_t d = 0; d < DEPTH; d++) {
            const uint32_t chunk = base + d * warps;
            if (chunk >= chunks) break;
#pragma unroll
            for (uint32_t s = 0; s < SETS; s++) {
#pragma unroll
                for (uint32_t i = 0; i < TILES; i++) {
                    // Sums leave the tensor cores, which keep few bits of them, every 128 products.
                    float part[4] = {};
#pragma unroll
                    for (uint32_t p = 0; p < 2; p++) {
                        const uint4 high = EIGHTS == 2 ? weights[d][s][EIGHTS - 1][p] : make_uint4(0, 0, 0, 0);
                        x[d][i][p].multiply(part, weights[d][s][0][p], high);
                    }
                    if constexpr (BLOCK) {
                        const uint32_t k = chunk * CHUNK;
#pragma unroll
                        for (uint32_t c = 0; c < 4; c++) {
                            uint32_t row = min(first + s * 16 + c / 2 * 8 + g, args.n - 1);
                            uint32_t token = min(i * 8 + t * 2 + c % 2, args.m - 1);
                            float scale = args.weight_scales[row / args.weight_scale_rows * args.weight_scale_row +
                                                             k / args.weight_scale_run];
                            if (args.x_scales) {
                                scale *= args.x_scales[token * args.x_scale_row + k / args.x_scale_run];
                            }
                            total[s][i][c] += part[c] * scale;
                        }
                    } else {
#pragma unroll
                        for (uint32_t c = 0; c < 4; c++) total[s][i][c] += part[c];
                    }
                }
            }
            const uint32_t next = chunk + DEPTH * warps;
            if (next < chunks) {
                load_weights(d, next);
                load_x(d, next);
            }
        }
    }

#pragma unroll
    for (uint32_t s = 0; s < SETS; s++) {
#pragma unroll
        for (uint32_t i = 0; i < TILES; i++) {
#pragma unroll
            for (uint32_t c = 0; c < 2 * EIGHTS; c++) {
                uint32_t token = i * 8 + t * 2 + c % 2, row = s * 16 + c / 2 * 8 + g;
                sums[(warp * TILES * 8 + token) * ROWS + row] = total[s][i][c];
            }
        }
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < args.m * ROWS; i += blockDim.x) {
        uint32_t token = i / ROWS, row = first + i % ROWS;
        if (row >= args.n) continue;
        float sum = 0.0f;
        for (uint32_t w = 0; w < warps; w++) sum += sums[w * TILES * 8 * ROWS + i];
        if constexpr (!BLOCK) {
            float scale = args.weight_scales[row / args.weight_scale_rows * args.weight_scale_row];
            if (args.x_scales) scale *= args.x_scales[token * args.x_scale_row];
            sum *= scale;
        }
        store_result(args, token, row, sum);
    }
}

#define SKINNY(NAME, T, ROWS, TILES, DEPTH)                                                                             \
    extern "C" __global__ void __launch_bounds__(512) scaled_mm_skinny_##NAME##_##ROWS##x##TILES(                        \
        const ScaledMm args) {                                                                                         \
        skinny<T, ROWS, TILES, DEPTH, false>(args);                                                                     \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(512) scaled_mm_skinny_##NAME##_##ROWS##x##TILES##_block(                \
        const ScaledMm args) {                                                                                         \
        skinny<T, ROWS, TILES, (DEPTH > 1 ? DEPTH - 1 : 1), true>(args);                                                \
    }

SKINNY(e4m3, uint8_t, 8, 1, 4)
SKINNY(e4m3, uint8_t, 16, 1, 3)
SKINNY(e4m3, uint8_t, 16, 2, 2)
SKINNY(e4m3, uint8_t, 32, 2, 1)
SKINNY(bf16, __nv_bfloat16, 8, 1, 3)
SKINNY(bf16, __nv_bfloat16, 16, 1, 2)
SKINNY(bf16, __nv_bfloat16, 16, 2, 1)
SKINNY(bf16, __nv_bfloat16, 32, 2, 1)
SKINNY(f16, __half, 8, 1, 3)
SKINNY(f16, __half, 16, 1, 2)
SKINNY(f16, __half, 16, 2, 1)
SKINNY(f16, __half, 32, 2, 1)
