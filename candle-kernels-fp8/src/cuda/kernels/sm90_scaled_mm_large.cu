// Products with many rows of activations, on Hopper.
//
// A pair of blocks computes ROWS tokens times 2 COLS output features, COLS a block: both need the same activations, so each
// copies half of them into the shared memory of both. A block's first warpgroup copies tiles of 128 codes along K into a
// ring; the other two multiply half of the tokens each, 64 at a time: the tensor cores keep few bits of a sum, so after 128
// products it is added to the total in registers, while the other warpgroup multiplies. Where scales change along K, two
// more warps of the first warpgroup put them beside the tiles, and sums are multiplied by them on their way to the total.
// Blocks stay and take tile after tile; tiles that are computed at the same time share rows and columns, for the L2 cache.

#include "scaled_mm.cuh"
#include "sm90.cuh"
#include "sm90_scales.cuh"

constexpr uint32_t DEPTH = 128, PAIR = 2, GROUP = 2048; // GROUP: tokens whose tiles are computed together
constexpr uint32_t CONSUMERS = 2, WARPGROUP = 128;
constexpr uint32_t SUPPLIERS = CONSUMERS; // warps that load scales

// Scales of a step for four threads that hold sums of the same rows: of those rows of each product.
template <uint32_t PRODUCTS>
struct alignas(8 * PRODUCTS) PartScales {
    float row[PRODUCTS * 2];
};

// The tile is of ROWS tokens and COLS output features.
template <uint32_t ROWS, uint32_t COLS>
struct Shared {
    // 64 rows of a consumer at a time.
    static constexpr uint32_t GROUP_ROWS = ROWS / CONSUMERS, PRODUCTS = GROUP_ROWS / 64;
    // Features of a run share a scale where blocks of 128 do: tiles start at multiples of COLS.
    static constexpr uint32_t RUNS = 128 % COLS == 0 ? 1 : 3, RUN = COLS / RUNS;
    static_assert(128 % RUN == 0);
    // What is left of 227 KiB.
    static constexpr uint32_t STAGES = ROWS + COLS > 288 ? 4 : ROWS + COLS > 256 ? 5 : ROWS + COLS > 192 ? 6 : 8;
    static constexpr uint32_t PART = COLS / 2; // of the columns, stored at a time
    static constexpr uint32_t PAD = 8;         // keeps the rows of a warp's results in different banks
    alignas(1024) uint8_t x[STAGES][ROWS][DEPTH];
    alignas(1024) uint8_t weight[STAGES][COLS][DEPTH];
    alignas(16) uint16_t results[CONSUMERS * 4][16][PART + PAD]; // of a warp: 16 rows
    PartScales<PRODUCTS> part_scales[STAGES][RUNS][CONSUMERS * 32];
    float scales[CONSUMERS][COLS], bias[CONSUMERS][COLS], row_scales[CONSUMERS][GROUP_ROWS];
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
    // The block stays until the other one has freed all stages here: nobody arrives at the barriers of a block that is gone.
    for (uint32_t i = 0; i < STAGES; i++) {
        barrier_wait(shared_address(&shared.empty[stage]), phase ^ 1);
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
}

// Puts scales into the ring: a warp those of a group's rows. A line of memory holds scales of many steps, but of few
// rows, and each line that a load touches takes time which copies and products want, too. So a lane loads four steps at
// once, of each 16th row, its neighbour the four that follow: eight steps are the least that memory gives.
template <uint32_t ROWS, uint32_t COLS>
__device__ __forceinline__ void supply(Shared<ROWS, COLS>& shared, const ScaledMm& args, uint32_t rank,
                                       uint32_t group) {
    using Ring = Shared<ROWS, COLS>;
    constexpr uint32_t LANE_ROWS = Ring::GROUP_ROWS / 16, RUNS = Ring::RUNS, BATCH = 8; // BATCH: steps loaded together
    const Tiles<ROWS, COLS> tiles(args);
    const uint32_t steps = (args.k + DEPTH - 1) / DEPTH, lane = threadIdx.x % 32, row = lane / 2, quad = lane % 2;
    uint32_t stage = 0, phase = 0;
    for (uint32_t tile = blockIdx.x / PAIR; tile < tiles.count(); tile += gridDim.x / PAIR) {
        uint32_t tile_row, pair, of_runs[RUNS];
        tiles.place(tile, tile_row, pair);
        const uint32_t first_row = tile_row * ROWS + group * Ring::GROUP_ROWS + row;
#pragma unroll
        for (uint32_t run = 0; run < RUNS; run++) {
            const uint32_t col = min((pair * PAIR + rank) * COLS + run * Ring::RUN, args.n - 1);
            of_runs[run] = quotient(col, args.weight_scale_rows);
        }
        for (uint32_t base = 0; base < steps; base += BATCH) {
            float row_scales[LANE_ROWS][4], run_scales[RUNS][4];
            load_steps(row_scales, args.x_scales, args.x_scale_row, args.x_scale_run, base + quad * 4, steps,
                       [&](uint32_t i) { return min(first_row + i * 16, args.m - 1); });
            load_steps(run_scales, args.weight_scales, args.weight_scale_row, args.weight_scale_run, base + quad * 4,
                       steps, [&](uint32_t run) { return of_runs[run]; });
#pragma unroll
            for (uint32_t step = 0; step < BATCH; step++) {
                if (base + step >= steps) break;
                barrier_wait(shared_address(&shared.empty[stage]), phase ^ 1);
                if (quad == step / 4) {
#pragma unroll
                    for (uint32_t i = 0; i < RUNS * LANE_ROWS; i++) {
                        const uint32_t run = i / LANE_ROWS, at = i % LANE_ROWS; // row at * 16 + row of the group
                        auto& part = shared.part_scales[stage][run][group * 32 + at % 4 * 8 + row % 8];
                        part.row[at / 4 * 2 + row / 8] = row_scales[at][step % 4] * run_scales[run][step % 4];
                    }
                }
                __syncwarp();
                warp_arrive(shared_address(&shared.full[stage]));
                if (++stage == Ring::STAGES) stage = 0, phase ^= 1;
            }
        }
    }
}

template <uint32_t ROWS, uint32_t COLS, bool BLOCK, bool FAST>
__device__ __forceinline__ void consume(Shared<ROWS, COLS>& shared, const ScaledMm& args, uint32_t rank) {
    const Tiles<ROWS, COLS> tiles(args);
    const uint32_t steps = (args.k + DEPTH - 1) / DEPTH;
    // The same in all lanes, as the compiler sees by this, so that addresses of tiles are computed once a warp.
    const uint32_t group = __shfl_sync(~0u, threadIdx.x / WARPGROUP - 1, 0), thread = threadIdx.x % WARPGROUP;
    const uint32_t warp = thread / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    constexpr uint32_t STAGES = Shared<ROWS, COLS>::STAGES, PART = Shared<ROWS, COLS>::PART;
    constexpr uint32_t GROUP_ROWS = Shared<ROWS, COLS>::GROUP_ROWS, PRODUCTS = Shared<ROWS, COLS>::PRODUCTS;
    constexpr uint32_t RUNS = Shared<ROWS, COLS>::RUNS, RUN = Shared<ROWS, COLS>::RUN;
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
                const uint64_t at = uint64_t(quotient(col, args.weight_scale_rows)) * args.weight_scale_row;
                copy4(shared_address(&shared.scales[group][i]), args.weight_scales + at);
            }
            shared.bias[group][i] = args.bias ? load_float(args.bias, col, args.bias_float) : 0.0f;
        }
        if (!BLOCK && thread < GROUP_ROWS) {
            const uint64_t at = uint64_t(min(first_row + thread, args.m - 1)) * args.x_scale_row;
            copy4(shared_address(&shared.row_scales[group][thread]), args.x_scales + at);
        }
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
                if (step > 0) warp_arrive_at_all<PAIR>(shared_address(&shared.empty[(stage + STAGES - 1) % STAGES]));
                if (++stage == STAGES) stage = 0, phase ^= 1;
            }
            products_wait<0>();
#pragma unroll
            for (uint32_t half = 0; half < PRODUCTS; half++) hold(total[half]);
            warp_arrive_at_all<PAIR>(shared_address(&shared.empty[(stage + STAGES - 1) % STAGES]));
        } else {
#pragma unroll
            for (uint32_t half = 0; half < PRODUCTS; half++) {
#pragma unroll
                for (uint32_t i = 0; i < COLS / 2; i++) total[half][i] = 0.0f;
            }
            struct Part {
                float sums[COLS / 2];
                PartScales<PRODUCTS> scales[RUNS];
            };
            auto load_scales = [&](PartScales<PRODUCTS> (&scales)[RUNS]) {
#pragma unroll
                for (uint32_t run = 0; run < RUNS; run++) {
                    scales[run] = shared.part_scales[stage][run][group * 32 + warp * 8 + g];
                }
                __syncwarp(); // all lanes have theirs before one says that the stage is free
            };
            auto multiply_half = [&](float (&sums)[COLS / 2], uint32_t half) {
                const uint64_t a = tile_descriptor(shared_address(shared.x[stage][group * GROUP_ROWS]));
                const uint64_t b = tile_descriptor(shared_address(shared.weight[stage]));
                hold(sums);
                products_fence();
#pragma unroll
                for (uint32_t k = 0; k < 4; k++) {
                    multiply<COLS>(sums, a + half * (64 * DEPTH / 16) + 2 * k, b + 2 * k, k > 0);
                }
                products_commit();
            };
            auto add = [&](const float (&sums)[COLS / 2], const PartScales<PRODUCTS> (&scales)[RUNS], uint32_t half) {
#pragma unroll
                for (uint32_t i = 0; i < COLS / 2; i++) {
                    if constexpr (BLOCK) {
                        total[half][i] += sums[i] * scales[i / 4 * 8 / RUN].row[half * 2 + i / 2 % 2];
                    } else {
                        total[half][i] += sums[i];
                    }
                }
            };
            auto free_stage = [&](uint32_t of) {
                warp_arrive_at_all<PAIR>(shared_address(&shared.empty[of]));
            };
            if constexpr (PRODUCTS == 1 && COLS <= 128) {
                // Registers are left for two parts: the tensor cores have the next one's products while one is added.
                Part parts[2];
                auto begin = [&](Part& part) {
                    barrier_wait(shared_address(&shared.full[stage]), phase);
                    multiply_half(part.sums, 0);
                    if constexpr (BLOCK) load_scales(part.scales);
                    if (++stage == STAGES) stage = 0, phase ^= 1;
                };
                auto finish = [&](Part& part, uint32_t begun) {
                    hold(part.sums);
                    free_stage(stage >= begun ? stage - begun : stage + STAGES - begun);
                    add(part.sums, part.scales, 0);
                };
                begin(parts[0]);
                uint32_t left = steps - 1;
                for (; left >= 2; left -= 2) {
#pragma unroll
                    for (uint32_t i = 0; i < 2; i++) {
                        begin(parts[1 - i]);
                        products_wait<1>();
                        finish(parts[i], 2);
                    }
                }
                if (left == 1) {
                    begin(parts[1]);
                    products_wait<1>();
                    finish(parts[0], 2);
                    products_wait<0>();
                    finish(parts[1], 1);
                } else {
                    products_wait<0>();
                    finish(parts[0], 1);
                }
            } else {
                Part part;
                for (uint32_t step = 0; step < steps; step++) {
                    barrier_wait(shared_address(&shared.full[stage]), phase);
#pragma unroll
                    for (uint32_t half = 0; half < PRODUCTS; half++) {
                        multiply_half(part.sums, half);
                        if (BLOCK && half == 0) load_scales(part.scales);
                        products_wait<0>();
                        hold(part.sums);
                        if (half == PRODUCTS - 1) free_stage(stage);
                        add(part.sums, part.scales, half);
                    }
                    if (++stage == STAGES) stage = 0, phase ^= 1;
                }
            }
        }

        copies_wait_all();
        named_barrier(1 + group, WARPGROUP); // scales and bias of all rows and columns are there
#pragma unroll
        for (uint32_t half = 0; half < PRODUCTS; half++) {
            float row_scale[2];
            for (uint32_t c = 0; c < 2; c++) row_scale[c] = shared.row_scales[group][half * 64 + warp * 16 + c * 8 + g];
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
    if (BLOCK && threadIdx.x / 32 == WARPGROUP / 32 - 1) {
        uint32_t row, pair;
        Tiles<ROWS, COLS>(args).place(blockIdx.x / PAIR, row, pair);
        fetch_scales(args, (pair * PAIR + rank) * COLS, COLS);
    }
    if (threadIdx.x == 0) {
        prefetch_map(&x);
        prefetch_map(&weight);
        for (uint32_t i = 0; i < shared.STAGES; i++) {
            barrier_init(shared_address(&shared.full[i]), BLOCK ? 1 + SUPPLIERS * ARRIVALS : 1);
            barrier_init(shared_address(&shared.empty[i]), CONSUMERS * 4 * PAIR * ARRIVALS); // warps
        }
        barrier_init_fence();
    }
    cluster_barrier_relaxed();
    launch_dependents();
    wait_for_inputs();
    // Of a thread. The three warpgroups start with 168 each: asking for more than that in all would wait forever.
    constexpr uint32_t FEW_REGISTERS = BLOCK ? 88 : 40, REGISTERS = (3 * 168 - FEW_REGISTERS) / 2;
    static_assert(FEW_REGISTERS % 8 == 0 && REGISTERS % 8 == 0);
    if (threadIdx.x < WARPGROUP) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(FEW_REGISTERS));
        if (threadIdx.x == 0) { // elect_one would make this 3% slower where tiles are 128 x 128
            produce(shared, args, x, weight, rank);
        } else if (BLOCK && threadIdx.x >= WARPGROUP - SUPPLIERS * 32) {
            supply(shared, args, rank, threadIdx.x / 32 - (WARPGROUP / 32 - SUPPLIERS));
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
        consume<ROWS, COLS, BLOCK, FAST>(shared, args, rank);
    }
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
LARGE(128, 192, _block, true, false)
LARGE(128, 128, _block, true, false)
LARGE(128, 96, _block, true, false)
LARGE(128, 64, _block, true, false)
LARGE(256, 128, _fast, false, true)
LARGE(128, 192, _fast, false, true)
LARGE(128, 128, _fast, false, true)
