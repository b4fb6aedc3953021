// Products with many rows of activations, on Hopper.
//
// A pair of blocks computes ROWS tokens times 2 COLS output features, COLS a block: both need the same activations, so each
// copies half of them into the shared memory of both. A block's first warpgroup copies tiles of 128 codes along K into a
// ring; the other two multiply half of the tokens each, 64 at a time: the tensor cores keep few bits of a sum, so after 128
// products it is added to the total in registers, while the other warpgroup multiplies.
// Blocks stay and take tile after tile; tiles that are computed at the same time share rows and columns, for the L2 cache.

#include "scaled_mm.cuh"
#include "sm90.cuh"

constexpr uint32_t DEPTH = 128, PAIR = 2, GROUP = 2048; // GROUP: tokens whose tiles are computed together
constexpr uint32_t CONSUMERS = 2, WARPGROUP = 128;

template <uint32_t ROWS, uint32_t COLS>
struct Shared {
    // What is left of 227 KiB.
    static constexpr uint32_t STAGES = ROWS + COLS > 288 ? 4 : ROWS + COLS > 256 ? 5 : ROWS + COLS > 192 ? 6 : 8;
    static constexpr uint32_t PART = COLS / 2; // of the columns, stored at a time
    static constexpr uint32_t PAD = 8;         // keeps the rows of a warp's results in different banks
    alignas(1024) uint8_t x[STAGES][ROWS][DEPTH];
    alignas(1024) uint8_t weight[STAGES][COLS][DEPTH];
    alignas(16) uint16_t results[CONSUMERS * 4][16][PART + PAD]; // of a warp: 16 rows
    float scales[CONSUMERS][COLS], bias[CONSUMERS][COLS];
    uint64_t full[STAGES], empty[STAGES];
};

// The tiles of a pair of blocks, in the order of `tile`.
template <uint32_t ROWS, uint32_t COLS>
struct Tiles {
    static constexpr uint32_t HEIGHT = GROUP / ROWS;
    uint32_t rows, pairs; // tiles along M; pairs of tiles along N

    __device__ __forceinline__ Tiles(const ScaledMm& args)
        : rows((args.m + ROWS - 1) / ROWS), pairs((args.n + PAIR * COLS - 1) / (PAIR * COLS)) {}
    __device__ __forceinline__ uint32_t count() const { return rows * pairs; }
    // A group of tiles of rows goes through all columns together.
    __device__ __forceinline__ void place(uint32_t tile, uint32_t& row, uint32_t& pair) const {
        const uint32_t group = tile / (HEIGHT * pairs), within = tile % (HEIGHT * pairs);
        const uint32_t height = min(HEIGHT, rows - group * HEIGHT);
        row = group * HEIGHT + within % height;
        pair = within / height;
    }
};

template <uint32_t ROWS, uint32_t COLS>
__device__ __forceinline__ void produce(Shared<ROWS, COLS>& shared, const ScaledMm& args, const CUtensorMap& x,
                                        const CUtensorMap& weight, uint32_t rank) {
    constexpr uint32_t STAGES = Shared<ROWS, COLS>::STAGES, SHARE = ROWS / PAIR;
    const Tiles<ROWS, COLS> tiles(args);
    const uint32_t steps = (args.k + DEPTH - 1) / DEPTH;
    uint32_t stage = 0, phase = 0;
    for (uint32_t tile = blockIdx.x / PAIR; tile < tiles.count(); tile += gridDim.x / PAIR) {
        uint32_t row, pair;
        tiles.place(tile, row, pair);
        const uint32_t first_row = row * ROWS + rank * SHARE, first_col = (pair * PAIR + rank) * COLS;
        for (uint32_t step = 0; step < steps; step++) {
            const uint32_t full = shared_address(&shared.full[stage]);
            barrier_wait(shared_address(&shared.empty[stage]), phase ^ 1);
            barrier_expect(full, (ROWS + COLS) * DEPTH);
            copy_tile_to(shared_address(shared.x[stage][rank * SHARE]), &x, step * DEPTH, first_row, full, 3);
            copy_weight_tile(args, shared_address(shared.weight[stage]), &weight, step * DEPTH, first_col, full);
            if (++stage == STAGES) stage = 0, phase ^= 1;
        }
    }
}

// Which scale of a row belongs to a step along K; asked for step after step.
struct Run {
    uint32_t length, index = 0, passed = 0; // steps

    __device__ __forceinline__ explicit Run(uint32_t run) : length((run + DEPTH - 1) / DEPTH) {}
    __device__ __forceinline__ void advance() {
        if (++passed == length) passed = 0, index++;
    }
};

// The scales of a thread's rows, two of each product, and of the columns, for one part of K.
template <uint32_t PRODUCTS>
struct PartScales {
    float row[PRODUCTS][2], col;
};

template <uint32_t ROWS, uint32_t COLS, bool BLOCK, bool FAST>
__device__ __forceinline__ void consume(Shared<ROWS, COLS>& shared, const ScaledMm& args, uint32_t rank) {
    const Tiles<ROWS, COLS> tiles(args);
    const uint32_t steps = (args.k + DEPTH - 1) / DEPTH;
    // The same in all lanes, as the compiler sees by this, so that addresses of tiles are computed once a warp.
    const uint32_t group = __shfl_sync(~0u, threadIdx.x / WARPGROUP - 1, 0), thread = threadIdx.x % WARPGROUP;
    const uint32_t warp = thread / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    constexpr uint32_t STAGES = Shared<ROWS, COLS>::STAGES, PART = Shared<ROWS, COLS>::PART;
    constexpr uint32_t GROUP_ROWS = ROWS / CONSUMERS, PRODUCTS = GROUP_ROWS / 64;
    auto& results = shared.results[group * 4 + warp];
    uint32_t stage = 0, phase = 0;

    for (uint32_t tile = blockIdx.x / PAIR; tile < tiles.count(); tile += gridDim.x / PAIR) {
        uint32_t tile_row, pair;
        tiles.place(tile, tile_row, pair);
        const uint32_t first_row = tile_row * ROWS + group * GROUP_ROWS, first_col = (pair * PAIR + rank) * COLS;

        // The row of sums [half][c / 2] that this thread holds.
        auto row_of = [&](uint32_t half, uint32_t c) { return first_row + half * 64 + warp * 16 + c * 8 + g; };
        named_barrier(1 + group, WARPGROUP); // the last tile's are not needed any more
        for (uint32_t i = thread; i < COLS; i += WARPGROUP) {
            const uint32_t col = min(first_col + i, args.n - 1);
            if constexpr (!BLOCK) {
                shared.scales[group][i] = weight_scale(args, col, 0);
            }
            shared.bias[group][i] = args.bias ? load_float(args.bias, col, args.bias_float) : 0.0f;
        }
        const float *x_scales[PRODUCTS][2], *col_scales;
        Run x_run(args.x_scale_run), col_run(args.weight_scale_run);
        if constexpr (BLOCK) {
            col_scales = args.weight_scales +
                         uint64_t(min(first_col, args.n - 1) / args.weight_scale_rows) * args.weight_scale_row;
#pragma unroll
            for (uint32_t i = 0; i < PRODUCTS * 2; i++) {
                const uint32_t row = min(row_of(i / 2, i % 2), args.m - 1);
                x_scales[i / 2][i % 2] = args.x_scales + uint64_t(row) * args.x_scale_row;
            }
        }
        // Those of the next step, loaded a step ahead; past the end of K those of the last one.
        auto part_scales = [&](bool last) {
            PartScales<PRODUCTS> scales;
            scales.col = col_scales[col_run.index];
#pragma unroll
            for (uint32_t i = 0; i < PRODUCTS * 2; i++) scales.row[i / 2][i % 2] = x_scales[i / 2][i % 2][x_run.index];
            if (!last) x_run.advance(), col_run.advance();
            return scales;
        };

        float total[PRODUCTS][COLS / 2];
        if constexpr (FAST) {
            for (uint32_t step = 0; step < steps; step++) {
                barrier_wait(shared_address(&shared.full[stage]), phase);
                const uint64_t a = tile_descriptor(shared_address(shared.x[stage][group * GROUP_ROWS]));
                const uint64_t b = tile_descriptor(shared_address(shared.weight[stage]));
#pragma unroll
                for (uint32_t half = 0; half < PRODUCTS; half++) hold(total[half]);
                products_fence();
#pragma unroll
                for (uint32_t k = 0; k < 4; k++) {
#pragma unroll
                    for (uint32_t half = 0; half < PRODUCTS; half++) {
                        multiply<COLS>(total[half], a + half * (64 * DEPTH / 16) + 2 * k, b + 2 * k, step + k > 0);
                    }
                }
                products_commit();
                // The stage before this one is free when its products are done.
                products_wait<1>();
                if (step > 0 && lane < PAIR) {
                    barrier_arrive_at(shared_address(&shared.empty[(stage + STAGES - 1) % STAGES]), lane);
                }
                if (++stage == STAGES) stage = 0, phase ^= 1;
            }
            products_wait<0>();
#pragma unroll
            for (uint32_t half = 0; half < PRODUCTS; half++) hold(total[half]);
            if (lane < PAIR) barrier_arrive_at(shared_address(&shared.empty[(stage + STAGES - 1) % STAGES]), lane);
        } else {
#pragma unroll
            for (uint32_t half = 0; half < PRODUCTS; half++) {
#pragma unroll
                for (uint32_t i = 0; i < COLS / 2; i++) total[half][i] = 0.0f;
            }
            PartScales<PRODUCTS> scales, next;
            if constexpr (BLOCK) next = part_scales(steps == 1);
            for (uint32_t step = 0; step < steps; step++) {
                if constexpr (BLOCK) {
                    scales = next;
                    next = part_scales(step + 2 >= steps);
                }
                barrier_wait(shared_address(&shared.full[stage]), phase);
                const uint64_t a = tile_descriptor(shared_address(shared.x[stage][group * GROUP_ROWS]));
                const uint64_t b = tile_descriptor(shared_address(shared.weight[stage]));
#pragma unroll
                for (uint32_t half = 0; half < PRODUCTS; half++) {
                    float part[COLS / 2];
                    hold(part);
                    products_fence();
#pragma unroll
                    for (uint32_t k = 0; k < 4; k++) {
                        multiply<COLS>(part, a + half * (64 * DEPTH / 16) + 2 * k, b + 2 * k, k > 0);
                    }
                    products_commit();
                    products_wait<0>();
                    hold(part);
                    if (half == PRODUCTS - 1 && lane < PAIR) barrier_arrive_at(shared_address(&shared.empty[stage]), lane);
                    if constexpr (BLOCK) {
                        const float scale[2] = {scales.row[half][0] * scales.col, scales.row[half][1] * scales.col};
#pragma unroll
                        for (uint32_t i = 0; i < COLS / 2; i++) total[half][i] += part[i] * scale[i / 2 % 2];
                    } else {
#pragma unroll
                        for (uint32_t i = 0; i < COLS / 2; i++) total[half][i] += part[i];
                    }
                }
                if (++stage == STAGES) stage = 0, phase ^= 1;
            }
        }

        named_barrier(1 + group, WARPGROUP); // scales and bias of all columns are there
#pragma unroll
        for (uint32_t half = 0; half < PRODUCTS; half++) {
            float row_scale[2];
            for (uint32_t c = 0; c < 2; c++) {
                const uint32_t row = min(row_of(half, c), args.m - 1);
                row_scale[c] = BLOCK ? 1.0f : x_scale(args, row, 0);
            }
            auto result = [&](uint32_t i, uint32_t col) {
                float sum = total[half][i];
                if constexpr (!BLOCK) sum *= row_scale[i / 2 % 2] * shared.scales[group][col];
                return sum + shared.bias[group][col];
            };
            if (args.out_float == F32) {
#pragma unroll
                for (uint32_t i = 0; i < COLS / 2; i++) {
                    const uint32_t row = row_of(half, i / 2 % 2), col = i / 4 * 8 + t * 2 + i % 2;
                    const float value = result(i, col);
                    if (row < args.m && first_col + col < args.n) {
                        static_cast<float*>(args.out)[uint64_t(row) * args.n + first_col + col] = value;
                    }
                }
                continue;
            }
            // Through shared memory, so that a warp writes long pieces of rows.
            uint16_t* const out = static_cast<uint16_t*>(args.out);
            const uint32_t warp_row = first_row + half * 64 + warp * 16;
#pragma unroll
            for (uint32_t part = 0; part < COLS; part += PART) {
                __syncwarp();
#pragma unroll
                for (uint32_t j = 0; j < PART / 16; j++) {
                    uint32_t words[4];
#pragma unroll
                    for (uint32_t w = 0; w < 4; w++) {
                        const uint32_t i = part / 2 + j * 8 + w * 2, col = part + j * 16 + w / 2 * 8 + t * 2;
                        words[w] = pack2(result(i, col), result(i + 1, col + 1), args.out_float);
                    }
                    store_matrices(&results[lane % 16][j * 16 + lane / 16 * 8], words);
                }
                __syncwarp();
                const uint32_t part_col = first_col + part;
                if (args.n % 8 == 0) {
#pragma unroll
                    for (uint32_t i = lane; i < 16 * PART / 8; i += 32) {
                        const uint32_t row = i / (PART / 8), col = i % (PART / 8) * 8;
                        if (warp_row + row < args.m && part_col + col < args.n) {
                            const uint4 value = *reinterpret_cast<const uint4*>(&results[row][col]);
                            *reinterpret_cast<uint4*>(out + uint64_t(warp_row + row) * args.n + part_col + col) = value;
                        }
                    }
                } else {
                    for (uint32_t i = lane; i < 16 * PART; i += 32) {
                        const uint32_t row = i / PART, col = i % PART;
                        if (warp_row + row < args.m && part_col + col < args.n) {
                            out[uint64_t(warp_row + row) * args.n + part_col + col] = results[row][col];
                        }
                    }
                }
            }
        }
    }
}

template <uint32_t ROWS, uint32_t COLS, bool BLOCK, bool FAST>
__device__ __forceinline__ void large(const ScaledMm& args, const CUtensorMap& x, const CUtensorMap& weight) {
    auto& shared = aligned_shared<Shared<ROWS, COLS>>();
    const uint32_t rank = cluster_rank();
    if (threadIdx.x == 0) {
        prefetch_map(&x);
        prefetch_map(&weight);
        for (uint32_t i = 0; i < shared.STAGES; i++) {
            barrier_init(shared_address(&shared.full[i]), 1);
            barrier_init(shared_address(&shared.empty[i]), CONSUMERS * 4 * PAIR); // warps
        }
        barrier_init_fence();
    }
    cluster_barrier();
    launch_dependents();
    wait_for_inputs();
    if (threadIdx.x < WARPGROUP) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == 0) produce(shared, args, x, weight, rank);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        consume<ROWS, COLS, BLOCK, FAST>(shared, args, rank);
    }
    // The other block may still copy into this one's memory and arrive at its barriers.
    cluster_barrier();
}

#define LARGE(ROWS, COLS, SUFFIX, BLOCK, FAST)                                                                              \
    extern "C" __global__ void __launch_bounds__(384, 1) scaled_mm_sm90_large_##ROWS##x##COLS##SUFFIX(                  \
        const __grid_constant__ ScaledMm args, const __grid_constant__ CUtensorMap x,                                   \
        const __grid_constant__ CUtensorMap weight) {                                                                  \
        large<ROWS, COLS, BLOCK, FAST>(args, x, weight);                                                                \
    }

LARGE(256, 128, , false, false)
LARGE(128, 192, , false, false)
LARGE(128, 128, , false, false)
LARGE(128, 96, , false, false)
LARGE(128, 64, , false, false)
LARGE(256, 128, _block, true, false)
LARGE(128, 128, _block, true, false)
LARGE(128, 64, _block, true, false)
LARGE(256, 128, _fast, false, true)
LARGE(128, 192, _fast, false, true)
LARGE(128, 128, _fast, false, true)
