// Attention of many queries on the tensor core instructions that every card since Ada has.
//
// A block has ROWS rows of a head of keys, each of its warps 32 of them, and goes through the keys that they see, KEYS
// at a time. Two tiles of keys and values are in shared memory: one is computed with, the next one on its way. Scores
// and sums stay in registers; the scores of a tile become the left factor of the product with its values where they
// are.

#include "attention.cuh"
#include "mma.cuh"
#include "primitives.cuh"
#include "tiles.cuh"

constexpr uint32_t WARPS = 4, THREADS = WARPS * 32, WARP_ROWS = 32, ROWS = WARPS * WARP_ROWS, KEYS = 64;

__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) {
    mma_f16(d, a[0], a[1], a[2], a[3], b0, b1);
}
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                         __nv_bfloat16) {
    mma_bf16(d, a[0], a[1], a[2], a[3], b0, b1);
}

__device__ __forceinline__ uint32_t pack(float low, float high, __half) { return pack2(low, high, F16); }
__device__ __forceinline__ uint32_t pack(float low, float high, __nv_bfloat16) { return pack2(low, high, BF16); }

// As `read_matrices`, each matrix transposed: word w of lane 4 g + t is column g of rows 2 t and 2 t + 1 of matrix w.
__device__ __forceinline__ void read_transposed(uint32_t (&words)[4], const uint8_t* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(shared_address(row))
                 : "memory");
}

template <uint32_t D>
struct Shared {
    uint8_t q[ROWS * D * 2]; // and results
    uint8_t k[2][KEYS * D * 2], v[2][KEYS * D * 2];
};

template <typename T, uint32_t D>
__device__ __forceinline__ void attention_many_rows(const Attention& args) {
    using Layout = Tile<D * 2, 8>;
    constexpr uint32_t PIECES = Layout::PIECES, AT_ONCE = THREADS / PIECES;
    extern __shared__ uint4 memory[];
    Shared<D>& shared = *reinterpret_cast<Shared<D>*>(memory);
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint32_t head = blockIdx.x % args.kv_heads, sequence = blockIdx.x / args.kv_heads;
    // Those with the most keys first, so that no block is left to the end alone.
    const uint32_t first_row = (gridDim.y - 1 - blockIdx.y) * ROWS;
    const uint32_t rows = min(ROWS, args.queries * args.group - first_row);
    launch_dependents();
    wait_for_inputs();
    const uint32_t position = args.position_of(sequence);
    const uint32_t begin = args.begin(position, first_row), end = args.end(position, first_row + rows - 1);

    const uint32_t own_row = threadIdx.x / PIECES, own_piece = threadIdx.x % PIECES;
    const T* const keys = args.keys<T>(sequence, head) + own_piece * 8;
    const T* const values = args.values<T>(sequence, head) + own_piece * 8;
    const auto copy = [&](uint8_t* to, const T* from, uint32_t first) {
#pragma unroll
        for (uint32_t i = 0; i < KEYS; i += AT_ONCE) {
            // Past the end, the last key once more: its weight will be zero.
            const uint32_t key = min(first + own_row + i, end - 1);
            copy16(shared_address(to + Layout::place(own_row + i, own_piece)), from + uint64_t(key) * D, 16);
        }
    };
#pragma unroll 4
    for (uint32_t row = own_row; row < ROWS; row += AT_ONCE) {
        const uint32_t there = min(row, rows - 1);
        const T* const from = static_cast<const T*>(args.q) + args.at(sequence, head, first_row + there, args.q_stride);
        copy16(shared_address(shared.q + Layout::place(row, own_piece)), from + own_piece * 8, 16);
    }
    copy(shared.k[0], keys, begin);
    copy(shared.v[0], values, begin);
    copies_commit();

    // Of rows 16 s + g + 8 h of the warp: where the keys that they see end, largest score, sum of this lane's weights.
    const uint32_t warp_row = first_row + warp * WARP_ROWS;
    uint32_t to[2][2];
    float most[2][2], sum[2][2];
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) {
        const uint32_t row = warp_row + i * 8 + g;
        to[i / 2][i % 2] = min(args.end(position, row), end);
        most[i / 2][i % 2] = -INFINITY, sum[i / 2][i % 2] = 0.0f;
    }
    // All keys from here to there are seen by all rows of the warp; none from `warp_end` on by any of them.
    const uint32_t all_from = args.begin(position, warp_row + WARP_ROWS - 1), all_to = args.end(position, warp_row);
    const uint32_t warp_end = args.end(position, warp_row + WARP_ROWS - 1);
    float out[2][D / 8][4] = {};
    const uint8_t* const q = shared.q + warp * WARP_ROWS * D * 2;

    for (uint32_t first = begin, stage = 0; first < end; first += KEYS, stage ^= 1) {
        copies_wait_all();
        __syncthreads();
        if (first + KEYS < end) {
            copy(shared.k[stage ^ 1], keys, first + KEYS);
            copy(shared.v[stage ^ 1], values, first + KEYS);
            copies_commit();
        }
        if (first >= warp_end) continue;

        float scores[2][KEYS / 8][4] = {};
#pragma unroll
        for (uint32_t d = 0; d < D / 16; d++) {
            uint32_t a[2][4];
#pragma unroll
            for (uint32_t s = 0; s < 2; s++) {
                read_matrices(a[s], q + Layout::place(s * 16 + lane % 16, 2 * d + lane / 16));
            }
#pragma unroll
            for (uint32_t n = 0; n < KEYS / 16; n++) {
                uint32_t b[4];
                const uint32_t row = n * 16 + lane / 16 * 8 + lane % 8;
                read_matrices(b, shared.k[stage] + Layout::place(row, 2 * d + lane / 8 % 2));
#pragma unroll
                for (uint32_t s = 0; s < 2; s++) {
                    multiply(scores[s][2 * n], a[s], b[0], b[1], T());
                    multiply(scores[s][2 * n + 1], a[s], b[2], b[3], T());
                }
            }
        }

        if (first < all_from || first + KEYS > all_to) {
#pragma unroll
            for (uint32_t i = 0; i < KEYS; i++) {
                const uint32_t s = i / (KEYS / 2), n = i / 4 % (KEYS / 8), c = i % 4;
                const uint32_t key = first + n * 8 + 2 * t + c % 2;
                if (key >= to[s][c / 2] || to[s][c / 2] - key > args.window) scores[s][n][c] = -INFINITY;
            }
        }
#pragma unroll
        for (uint32_t s = 0; s < 2; s++) {
#pragma unroll
            for (uint32_t h = 0; h < 2; h++) {
                float largest = most[s][h];
#pragma unroll
                for (uint32_t n = 0; n < KEYS / 8; n++) {
                    largest = fmaxf(largest, fmaxf(scores[s][n][2 * h], scores[s][n][2 * h + 1]));
                }
                largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
                largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
                const float below = reference(largest) * args.scale;
                const float factor = exp2_fast(__fmaf_rn(most[s][h], args.scale, -below));
                most[s][h] = largest;
                sum[s][h] *= factor;
#pragma unroll
                for (uint32_t n = 0; n < KEYS / 8; n++) {
#pragma unroll
                    for (uint32_t c = 2 * h; c < 2 * h + 2; c++) {
                        scores[s][n][c] = exp2_fast(__fmaf_rn(scores[s][n][c], args.scale, -below));
                        sum[s][h] += scores[s][n][c];
                    }
                }
#pragma unroll
                for (uint32_t n = 0; n < D / 8; n++) out[s][n][2 * h] *= factor, out[s][n][2 * h + 1] *= factor;
            }
        }

#pragma unroll
        for (uint32_t n = 0; n < KEYS / 16; n++) {
            uint32_t a[2][4];
#pragma unroll
            for (uint32_t s = 0; s < 2; s++) {
#pragma unroll
                for (uint32_t i = 0; i < 4; i++) {
                    const float* const pair = scores[s][2 * n + i / 2] + i % 2 * 2;
                    a[s][i] = pack(pair[0], pair[1], T());
                }
            }
#pragma unroll
            for (uint32_t d = 0; d < D / 16; d++) {
                uint32_t b[4];
                read_transposed(b, shared.v[stage] + Layout::place(n * 16 + lane % 16, 2 * d + lane / 16));
#pragma unroll
                for (uint32_t s = 0; s < 2; s++) {
                    multiply(out[s][2 * d], a[s], b[0], b[1], T());
                    multiply(out[s][2 * d + 1], a[s], b[2], b[3], T());
                }
            }
        }
    }

    // Through shared memory, where the warp's queries were, so that rows are written in pieces of 16 bytes.
    uint8_t* const results = shared.q + warp * WARP_ROWS * D * 2;
    __syncwarp();
#pragma unroll
    for (uint32_t s = 0; s < 2; s++) {
#pragma unroll
        for (uint32_t h = 0; h < 2; h++) {
            float total = sum[s][h];
            total += __shfl_xor_sync(~0u, total, 1);
            total += __shfl_xor_sync(~0u, total, 2);
            const float by = reciprocal_fast(total);
#pragma unroll
            for (uint32_t n = 0; n < D / 8; n++) {
                uint8_t* const to = results + Layout::place(s * 16 + h * 8 + g, n) + t * 4;
                *reinterpret_cast<uint32_t*>(to) = pack(out[s][n][2 * h] * by, out[s][n][2 * h + 1] * by, T());
            }
        }
    }
    __syncwarp();
#pragma unroll 4
    for (uint32_t i = lane; i < WARP_ROWS * PIECES; i += 32) {
        const uint32_t row = i / PIECES, piece = i % PIECES;
        if (warp * WARP_ROWS + row >= rows) break;
        T* const to = static_cast<T*>(args.out) + args.at(sequence, head, warp_row + row, args.out_stride) + piece * 8;
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(results + Layout::place(row, piece));
    }
}

#define MANY_ROWS(NAME, T, D)                                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_many_rows_##NAME##_##D(Attention args) {        \
        attention_many_rows<T, D>(args);                                                                               \
    }

MANY_ROWS(bf16, __nv_bfloat16, 64)
MANY_ROWS(bf16, __nv_bfloat16, 128)
MANY_ROWS(f16, __half, 64)
MANY_ROWS(f16, __half, 128)
