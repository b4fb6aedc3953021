// Attention of few queries, as when one token after the other is generated: bound by reading keys and values.
//
// The keys that a block's rows see are split evenly among the blocks of a row of the grid, and among their warps in
// tiles. The number of blocks is fixed when the kernel is launched, the number of keys is not: blocks for which too few
// are left return at once. A warp multiplies tiles straight from registers: a lane loads 16 neighbouring bytes, and
// which dimension or key is where in a tensor core's instruction is free, as long as both factors agree. Scores are
// computed with keys as rows, S = K Q^T, so that eight rows are enough for an instruction; the sums with dimensions as
// rows, O^T = V^T S. The last block of a row of the grid adds up what all of them found, in the order of the keys.

#include "attention.cuh"
#include "mma.cuh"
#include "primitives.cuh"

constexpr uint32_t WARPS = 8, THREADS = WARPS * 32;
constexpr uint32_t AT_ONCE = 16; // parts that a thread of the last block reads at once

__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) {
    mma_f16(d, a[0], a[1], a[2], a[3], b0, b1);
}
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                         __nv_bfloat16) {
    mma_bf16(d, a[0], a[1], a[2], a[3], b0, b1);
}

__device__ __forceinline__ uint32_t pack(float low, float high, __half) { return pack2(low, high, F16); }
__device__ __forceinline__ uint32_t pack(float low, float high, __nv_bfloat16) { return pack2(low, high, BF16); }

// 16 bytes that no other load of this block shares.
__device__ __forceinline__ void load_once(uint32_t (&words)[4], const void* from) {
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "l"(from));
}

// From the second-level cache, where other blocks wrote it; all are under way before the first is waited for.
__device__ __forceinline__ float load_fresh(const float* from) {
    float value;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(value) : "l"(from));
    return value;
}
__device__ __forceinline__ float4 load_fresh4(const float* from) {
    float4 value;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
                 : "l"(from));
    return value;
}

// A matrix [8, 8] of 16-bit values, two neighbours of row g in lane 4 g + t, transposed.
__device__ __forceinline__ uint32_t transposed(uint32_t pair) {
    uint32_t result;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
    return result;
}

// Of eight lanes that differ in g.
__device__ __forceinline__ float max_of_eight(float value) {
#pragma unroll
    for (uint32_t lanes = 4; lanes < 32; lanes *= 2) value = fmaxf(value, __shfl_xor_sync(~0u, value, lanes));
    return value;
}
__device__ __forceinline__ float sum_of_eight(float value) {
#pragma unroll
    for (uint32_t lanes = 4; lanes < 32; lanes *= 2) value += __shfl_xor_sync(~0u, value, lanes);
    return value;
}

// What a part of the keys adds to ROWS rows, weights in powers of two below that of `most`.
template <uint32_t ROWS, uint32_t D>
struct Part {
    float most[ROWS], sum[ROWS];
    float out[ROWS][D];
};

// Of the warps of a block; rows are apart so that lanes write to other banks.
template <uint32_t ROWS, uint32_t D>
struct Shared {
    float most[WARPS][ROWS], sum[WARPS][ROWS];
    float out[WARPS][ROWS][D + 4];
};

template <typename T>
__device__ __forceinline__ void store4(T* to, const float4& values, float by) {
    *reinterpret_cast<uint2*>(to) =
        make_uint2(pack(values.x * by, values.y * by, T()), pack(values.z * by, values.w * by, T()));
}

__device__ __forceinline__ void add_weighted(float4& sums, float weight, const float4& values) {
    sums.x = __fmaf_rn(weight, values.x, sums.x), sums.y = __fmaf_rn(weight, values.y, sums.y);
    sums.z = __fmaf_rn(weight, values.z, sums.z), sums.w = __fmaf_rn(weight, values.w, sums.w);
}

// EIGHTS: rows of a block, by 8.
template <typename T, uint32_t D, uint32_t EIGHTS>
__device__ __forceinline__ void attention_few_rows(const Attention& args) {
    constexpr uint32_t ROWS = 8 * EIGHTS;
    // Of a warp's tile: 16 · SETS keys, 4 KiB; pieces of 32 dimensions of a key, and of 64 of a value.
    constexpr uint32_t SETS = 128 / D, TILE = 16 * SETS, QUARTERS = D / 32, HALVES = D / 64;
    extern __shared__ float4 memory[];
    const uint32_t warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const uint32_t sequence = blockIdx.z, head = blockIdx.y % args.kv_heads;
    const uint32_t first_row = blockIdx.y / args.kv_heads * ROWS;
    const uint32_t rows = min(ROWS, args.queries * args.group - first_row);
    launch_dependents();
    const uint32_t position = args.position_of(sequence);
    const uint32_t begin = args.begin(position, first_row), end = args.end(position, first_row + rows - 1);
    const uint32_t tiles = (end - begin + TILE - 1) / TILE;
    const uint32_t parts = min(args.splits, max(tiles / WARPS, 1));
    if (blockIdx.x >= parts) return;
    const uint32_t last = uint64_t(tiles) * (blockIdx.x + 1) / parts;
    uint32_t tile = uint64_t(tiles) * blockIdx.x / parts + warp;

    const T* const keys = args.keys<T>(sequence, head);
    const T* const values = args.values<T>(sequence, head);
    uint32_t k[SETS][2][QUARTERS][4], v[SETS][4][HALVES][4];
    // A tile's keys past the end are its last one once more; their weights will be zero.
    const auto load_keys = [&](uint32_t tile) {
#pragma unroll
        for (uint32_t i = 0; i < SETS * 2; i++) {
            const uint32_t key = min(begin + tile * TILE + i * 8 + g, end - 1);
            const T* const from = keys + uint64_t(key) * D + 8 * t;
#pragma unroll
            for (uint32_t j = 0; j < QUARTERS; j++) load_once(k[i / 2][i % 2][j], from + 32 * j);
        }
    };
    const auto load_values = [&](uint32_t tile) {
#pragma unroll
        for (uint32_t i = 0; i < SETS * 4; i++) {
            const uint32_t key = min(begin + tile * TILE + i / 4 * 16 + i % 4 / 2 * 8 + 2 * t + i % 2, end - 1);
            const T* const from = values + uint64_t(key) * D + 8 * g;
#pragma unroll
            for (uint32_t j = 0; j < HALVES; j++) load_once(v[i / 4][i % 4][j], from + 64 * j);
        }
    };
    // What was in the cache before is read while the kernels before this one still run.
    const bool early = begin + (tile + 1) * TILE <= position;
    if (tile < last && early) {
        load_keys(tile);
        load_values(tile);
    }
    wait_for_inputs();

    uint32_t q[EIGHTS][QUARTERS][4] = {};
#pragma unroll
    for (uint32_t e = 0; e < EIGHTS; e++) {
        const uint32_t row = 8 * e + g;
        if (row >= rows) continue;
        const T* const from = static_cast<const T*>(args.q) + args.at(sequence, head, first_row + row, args.q_stride);
#pragma unroll
        for (uint32_t j = 0; j < QUARTERS; j++) load_once(q[e][j], from + 32 * j + 8 * t);
    }
    if (tile < last && !early) {
        load_keys(tile);
        load_values(tile);
    }

    // Of rows 8 e + 2 t + c: keys that they see, largest score, sum of this lane's weights.
    uint32_t from[EIGHTS][2], to[EIGHTS][2];
    float most[EIGHTS][2], sum[EIGHTS][2];
#pragma unroll
    for (uint32_t i = 0; i < EIGHTS * 2; i++) {
        const uint32_t row = first_row + i / 2 * 8 + 2 * t + i % 2;
        from[i / 2][i % 2] = args.begin(position, row), to[i / 2][i % 2] = min(args.end(position, row), end);
        most[i / 2][i % 2] = -INFINITY, sum[i / 2][i % 2] = 0.0f;
    }
    // Dimensions 64 j + 8 g + 2 w + c / 2 of rows 8 e + 2 t + c % 2.
    float out[EIGHTS][HALVES][4][4] = {};

    for (; tile < last; tile += WARPS) {
        float scores[SETS][EIGHTS][4] = {};
#pragma unroll
        for (uint32_t i = 0; i < SETS; i++) {
#pragma unroll
            for (uint32_t j = 0; j < QUARTERS; j++) {
#pragma unroll
                for (uint32_t w = 0; w < 4; w += 2) {
                    const uint32_t a[4] = {k[i][0][j][w], k[i][1][j][w], k[i][0][j][w + 1], k[i][1][j][w + 1]};
#pragma unroll
                    for (uint32_t e = 0; e < EIGHTS; e++) multiply(scores[i][e], a, q[e][j][w], q[e][j][w + 1], T());
                }
            }
        }
        const bool more = tile + WARPS < last;
        if (more) load_keys(tile + WARPS);

        uint32_t weights[SETS][EIGHTS][2];
#pragma unroll
        for (uint32_t e = 0; e < EIGHTS; e++) {
            float factor[2];
#pragma unroll
            for (uint32_t c = 0; c < 2; c++) {
                float largest = -INFINITY;
#pragma unroll
                for (uint32_t i = 0; i < SETS * 2; i++) {
                    float& score = scores[i / 2][e][i % 2 * 2 + c];
                    const uint32_t key = begin + tile * TILE + i * 8 + g;
                    score = key >= from[e][c] && key < to[e][c] ? score * args.scale : -INFINITY;
                    largest = fmaxf(largest, score);
                }
                largest = fmaxf(most[e][c], max_of_eight(largest));
                factor[c] = exp2_fast(most[e][c] - reference(largest));
                most[e][c] = largest;
                sum[e][c] *= factor[c];
#pragma unroll
                for (uint32_t i = 0; i < SETS * 2; i++) {
                    float& score = scores[i / 2][e][i % 2 * 2 + c];
                    score = exp2_fast(score - reference(largest));
                    sum[e][c] += score;
                }
            }
#pragma unroll
            for (uint32_t i = 0; i < SETS * 2; i++) {
                const float* const pair = scores[i / 2][e] + i % 2 * 2;
                weights[i / 2][e][i % 2] = transposed(pack(pair[0], pair[1], T()));
            }
#pragma unroll
            for (uint32_t i = 0; i < HALVES * 16; i++) out[e][i / 16][i / 4 % 4][i % 4] *= factor[i % 2];
        }
#pragma unroll
        for (uint32_t i = 0; i < SETS; i++) {
#pragma unroll
            for (uint32_t j = 0; j < HALVES; j++) {
#pragma unroll
                for (uint32_t w = 0; w < 4; w++) {
                    const uint32_t a[4] = {__byte_perm(v[i][0][j][w], v[i][1][j][w], 0x5410),
                                           __byte_perm(v[i][0][j][w], v[i][1][j][w], 0x7632),
                                           __byte_perm(v[i][2][j][w], v[i][3][j][w], 0x5410),
                                           __byte_perm(v[i][2][j][w], v[i][3][j][w], 0x7632)};
#pragma unroll
                    for (uint32_t e = 0; e < EIGHTS; e++) {
                        multiply(out[e][j][w], a, weights[i][e][0], weights[i][e][1], T());
                    }
                }
            }
        }
        if (more) load_values(tile + WARPS);
    }

    Shared<ROWS, D>& shared = *reinterpret_cast<Shared<ROWS, D>*>(memory);
#pragma unroll
    for (uint32_t e = 0; e < EIGHTS; e++) {
#pragma unroll
        for (uint32_t c = 0; c < 2; c++) {
            const uint32_t row = 8 * e + 2 * t + c;
            const float total = sum_of_eight(sum[e][c]);
            if (g == 0) shared.most[warp][row] = most[e][c], shared.sum[warp][row] = total;
#pragma unroll
            for (uint32_t j = 0; j < HALVES; j++) {
                const auto& own = out[e][j];
                float4* const place = reinterpret_cast<float4*>(&shared.out[warp][row][64 * j + 8 * g]);
                place[0] = make_float4(own[0][c], own[0][c + 2], own[1][c], own[1][c + 2]);
                place[1] = make_float4(own[2][c], own[2][c + 2], own[3][c], own[3][c + 2]);
            }
        }
    }
    __syncthreads();

    // Four dimensions of a row at a time: of this block's warps, then of all blocks.
    const uint32_t slot = sequence * gridDim.y + blockIdx.y;
    Part<ROWS, D>* const all = reinterpret_cast<Part<ROWS, D>*>(args.partial) + uint64_t(slot) * args.splits;
    T* const result = static_cast<T*>(args.out);
    for (uint32_t i = threadIdx.x; i < rows * (D / 4); i += THREADS) {
        const uint32_t row = i / (D / 4), col = i % (D / 4) * 4;
        float largest = -INFINITY, total = 0.0f;
#pragma unroll
        for (uint32_t w = 0; w < WARPS; w++) largest = fmaxf(largest, shared.most[w][row]);
        float4 sums = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (uint32_t w = 0; w < WARPS; w++) {
            const float weight = exp2_fast(shared.most[w][row] - reference(largest));
            total = __fmaf_rn(weight, shared.sum[w][row], total);
            add_weighted(sums, weight, *reinterpret_cast<const float4*>(&shared.out[w][row][col]));
        }
        if (parts == 1) {
            T* const to = result + args.at(sequence, head, first_row + row, args.out_stride) + col;
            store4(to, sums, reciprocal_fast(total));
            continue;
        }
        Part<ROWS, D>& own = all[blockIdx.x];
        *reinterpret_cast<float4*>(&own.out[row][col]) = sums;
        if (col == 0) own.most[row] = largest, own.sum[row] = total;
    }
    if (parts == 1) return;

    __shared__ bool is_last;
    __syncthreads();
    if (threadIdx.x == 0) is_last = count(&args.counters[slot], parts - 1) == parts - 1;
    __syncthreads();
    if (!is_last) return;
    for (uint32_t i = threadIdx.x; i < rows * (D / 4); i += THREADS) {
        const uint32_t row = i / (D / 4), col = i % (D / 4) * 4;
        float largest = -INFINITY, total = 0.0f;
        float4 sums = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        for (uint32_t first = 0; first < parts; first += AT_ONCE) {
            float part_most[AT_ONCE], part_sum[AT_ONCE];
            float4 part_out[AT_ONCE];
            float next = largest;
#pragma unroll
            for (uint32_t j = 0; j < AT_ONCE; j++) {
                const Part<ROWS, D>& part = all[min(first + j, parts - 1)];
                part_most[j] = load_fresh(&part.most[row]), part_sum[j] = load_fresh(&part.sum[row]);
                part_out[j] = load_fresh4(&part.out[row][col]);
            }
#pragma unroll
            for (uint32_t j = 0; j < AT_ONCE; j++) next = fmaxf(next, part_most[j]);
            const float factor = exp2_fast(largest - reference(next));
            total *= factor;
            sums.x *= factor, sums.y *= factor, sums.z *= factor, sums.w *= factor;
            largest = next;
#pragma unroll
            for (uint32_t j = 0; j < AT_ONCE; j++) {
                const float weight = first + j < parts ? exp2_fast(part_most[j] - reference(largest)) : 0.0f;
                total = __fmaf_rn(weight, part_sum[j], total);
                add_weighted(sums, weight, part_out[j]);
            }
        }
        store4(result + args.at(sequence, head, first_row + row, args.out_stride) + col, sums, reciprocal_fast(total));
    }
}

#define FEW_ROWS(NAME, T, D, ROWS)                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                           \
        attention_few_rows_##NAME##_##D##_##ROWS(Attention args) {                                                     \
        attention_few_rows<T, D, ROWS / 8>(args);                                                                      \
    }

FEW_ROWS(bf16, __nv_bfloat16, 64, 8)
FEW_ROWS(bf16, __nv_bfloat16, 64, 16)
FEW_ROWS(bf16, __nv_bfloat16, 128, 8)
FEW_ROWS(bf16, __nv_bfloat16, 128, 16)
FEW_ROWS(f16, __half, 64, 8)
FEW_ROWS(f16, __half, 64, 16)
FEW_ROWS(f16, __half, 128, 8)
FEW_ROWS(f16, __half, 128, 16)
