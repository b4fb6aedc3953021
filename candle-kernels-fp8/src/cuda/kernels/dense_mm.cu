// Products of at most 16 rows of activations with a weight in half precision: bound by the bytes of the weight.
//
// A block takes tiles of ROWS output features, one after the other; its warps share out K in chunks. A lane copies 16
// neighbouring bytes of a row at a time into a ring in shared memory that is its own: nobody waits for anybody but
// where a tile ends, and what comes of the next tile is under way meanwhile. Read back, they are what a lane gives to a
// tensor core instruction, of which the weight is the left factor: its rows fill the instruction whatever m is. The
// columns are tokens, and which of 16 neighbours along K is where is free, as long as both factors agree.
//
// Activations come through the first-level cache, which all warps share, for each tile again: half as many bytes as
// the weight's for 16 tokens. Sums are added in the same order for any n, m and number of blocks.

#include "mma.cuh"
#include "shared.cuh"

constexpr uint32_t WARPS = 4, THREADS = WARPS * 32, ROWS = 32, EIGHTS = ROWS / 8, SETS = ROWS / 16;
constexpr uint32_t CHUNK = 64, PIECES = 2, PIECE = CHUNK / PIECES; // values along K; four lanes have a piece of a row
constexpr uint32_t DEPTH = 4;                                      // chunks that a warp has under way
static_assert(PIECE == 4 * 16 / sizeof(__half));

// Host twin: `Params` in `dense_mm.rs`.
struct DenseMm {
    const void* x;      // [m, k]
    const void* weight; // [n, k]
    const void* bias;   // null or [n], of bias_float
    void* out;          // [m, n], dense, of out_float
    uint64_t x_stride, weight_stride; // elements from row to row, which start at multiples of 16 bytes
    uint32_t m, n, k;                 // k: a multiple of 8
    Float bias_float, out_float;
};

// TILES: eights of tokens. Host twin: `shared` in `dense_mm.rs`.
template <uint32_t TILES>
struct Shared {
    uint4 ring[WARPS][DEPTH][EIGHTS][PIECES][32];
    float sums[2][WARPS][TILES * 8][ROWS + 4]; // of a tile and the one before; apart so that lanes write to other banks
};

__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&low)[4], const uint32_t (&high)[4],
                                         const uint32_t (&x)[4], uint32_t j, __half) {
    mma_f16(d, low[j], high[j], low[j + 1], high[j + 1], x[j], x[j + 1]);
}
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&low)[4], const uint32_t (&high)[4],
                                         const uint32_t (&x)[4], uint32_t j, __nv_bfloat16) {
    mma_bf16(d, low[j], high[j], low[j + 1], high[j + 1], x[j], x[j + 1]);
}

__device__ __forceinline__ void read16(uint32_t (&words)[4], const void* from) {
    const uint4 read = *static_cast<const uint4*>(from);
    words[0] = read.x, words[1] = read.y, words[2] = read.z, words[3] = read.w;
}

template <typename T, uint32_t TILES>
__device__ __forceinline__ void dense_mm(const DenseMm& args) {
    extern __shared__ uint4 memory[];
    Shared<TILES>& shared = *reinterpret_cast<Shared<TILES>*>(memory);
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint32_t tiles = (args.n + ROWS - 1) / ROWS;
    // Chunks that start past the end of K are zeros.
    const uint32_t steps = (args.k + CHUNK * WARPS - 1) / (CHUNK * WARPS);
    // A lane's first value of a step, in the first piece.
    const auto begin = [&](uint32_t step) { return (step * WARPS + warp) * CHUNK + t * 8; };

    // What is copied next.
    uint32_t copy_tile = blockIdx.x, copy_step = 0;
    const auto copy_next = [&](uint32_t slot) {
        if (copy_tile < tiles) {
            const uint32_t k = begin(copy_step);
#pragma unroll
            for (uint32_t e = 0; e < EIGHTS; e++) {
                // Rows past the end repeat the last one: read, but never stored.
                const uint32_t row = min(copy_tile * ROWS + e * 8 + g, args.n - 1);
                const T* const from = static_cast<const T*>(args.weight) + row * args.weight_stride + k;
#pragma unroll
                for (uint32_t p = 0; p < PIECES; p++) {
                    const bool present = k + p * PIECE < args.k;
                    const void* const piece = present ? from + p * PIECE : args.weight;
                    copy16(shared_address(&shared.ring[warp][slot][e][p][lane]), piece, present ? 16 : 0);
                }
            }
            if (++copy_step == steps) copy_step = 0, copy_tile += gridDim.x;
        }
        copies_commit();
    };
#pragma unroll
    for (uint32_t d = 0; d < DEPTH; d++) copy_next(d);
    launch_dependents();
    wait_for_inputs();

    // Activations of a step, zeros past the end of K and for tokens that are not there.
    uint32_t x[TILES][PIECES][4];
    const auto load_x = [&](uint32_t step) {
#pragma unroll
        for (uint32_t i = 0; i < TILES; i++) {
            const uint32_t token = i * 8 + g, k = begin(step);
            const T* const from = static_cast<const T*>(args.x) + token * args.x_stride + k;
#pragma unroll
            for (uint32_t p = 0; p < PIECES; p++) {
#pragma unroll
                for (uint32_t j = 0; j < 4; j++) x[i][p][j] = 0;
                if (token < args.m && k + p * PIECE < args.k) read16(x[i][p], from + p * PIECE);
            }
        }
    };
    load_x(0);

    uint32_t slot = 0, parity = 0;
    for (uint32_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        float total[SETS][TILES][4] = {};
        for (uint32_t step = 0; step < steps; step++) {
            copies_wait<DEPTH - 1>();
#pragma unroll
            for (uint32_t p = 0; p < PIECES; p++) {
#pragma unroll
                for (uint32_t s = 0; s < SETS; s++) {
                    uint32_t low[4], high[4];
                    read16(low, &shared.ring[warp][slot][2 * s][p][lane]);
                    read16(high, &shared.ring[warp][slot][2 * s + 1][p][lane]);
#pragma unroll
                    for (uint32_t i = 0; i < TILES; i++) {
#pragma unroll
                        for (uint32_t j = 0; j < 4; j += 2) multiply(total[s][i], low, high, x[i][p], j, T());
                    }
                }
            }
            // Of the next step, which may be the next tile's first: under way while this warp waits for the weight.
            load_x(step + 1 < steps ? step + 1 : 0);
            copy_next(slot);
            slot = (slot + 1) % DEPTH;
        }

#pragma unroll
        for (uint32_t s = 0; s < SETS; s++) {
#pragma unroll
            for (uint32_t i = 0; i < TILES; i++) {
#pragma unroll
                for (uint32_t c = 0; c < 4; c++) {
                    shared.sums[parity][warp][i * 8 + 2 * t + c % 2][s * 16 + c / 2 * 8 + g] = total[s][i][c];
                }
            }
        }
        // Of the sums before these, all have read what they store: they did before they came here.
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < args.m * ROWS; i += THREADS) {
            const uint32_t token = i / ROWS, row = i % ROWS, feature = tile * ROWS + row;
            if (feature >= args.n) continue;
            float sum = 0.0f;
#pragma unroll
            for (uint32_t w = 0; w < WARPS; w++) sum += shared.sums[parity][w][token][row];
            if (args.bias) sum += load_float(args.bias, feature, args.bias_float);
            store_float(args.out, uint64_t(token) * args.n + feature, sum, args.out_float);
        }
        parity ^= 1;
    }
}

#define DENSE_MM(NAME, T, TOKENS)                                                                                      \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) dense_mm_##NAME##_##TOKENS(DenseMm args) {                \
        dense_mm<T, TOKENS / 8>(args);                                                                                 \
    }

DENSE_MM(bf16, __nv_bfloat16, 8)
DENSE_MM(bf16, __nv_bfloat16, 16)
DENSE_MM(f16, __half, 8)
DENSE_MM(f16, __half, 16)
