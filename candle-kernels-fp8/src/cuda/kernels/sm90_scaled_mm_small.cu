// Products with few rows of activations, on Hopper: more than the tensor cores' instruction of eight, fewer than what makes
// a product bound by arithmetic.
//
// A block computes 128 output features times COLS tokens over a part of K: the weight is the left factor of the
// instruction, so that any number of tokens fills it. One warp copies tiles of 128 codes along K into a ring, two warpgroups
// multiply 64 features each. Where scales change along K, one more warp puts them beside the tiles. The blocks of a cluster
// share K out among them; in the end each adds up the sums of all blocks for some of the tokens, always in the same order.

#include "sm90_split.cuh"
#include "sm90_scales.cuh"

constexpr uint32_t ROWS = SPLIT_FEATURES, DEPTH = 128, CONSUMERS = 2, WARPGROUP = 128, PRODUCER = CONSUMERS * WARPGROUP;

// With a warp that copies tiles and one that loads scales.
template <bool BLOCK>
constexpr uint32_t THREADS = PRODUCER + (BLOCK ? 64 : 32);

template <uint32_t COLS>
struct Shared {
    // Two blocks fit a multiprocessor where a ring that hides the memory's latency leaves room.
    static constexpr uint32_t STAGES = COLS <= 32 ? 5 : COLS <= 64 ? 4 : 6;
    struct Ring {
        alignas(1024) uint8_t weight[STAGES][ROWS][DEPTH];
        alignas(1024) uint8_t x[STAGES][COLS][DEPTH];
    };
    union {
        Ring ring;
        float sums[COLS][ROWS + 4]; // after the last product; padded against bank conflicts
    };
    alignas(8) float scales[STAGES][COLS]; // of a stage's tokens times that of its weights
    float token_scales[COLS];
    uint64_t full[STAGES], empty[STAGES];
};

template <uint32_t COLS, bool BLOCK>
__device__ __forceinline__ void produce(Shared<COLS>& shared, const ScaledMm& args, const CUtensorMap& x,
                                        const CUtensorMap& weight, Share share, uint32_t row, uint32_t col,
                                        bool dependent) {
    constexpr uint32_t STAGES = Shared<COLS>::STAGES, BYTES = (ROWS + COLS) * DEPTH;
    const uint32_t lane = threadIdx.x % 32, steps = share.end - share.begin;
    auto full = [&](uint32_t stage) { return shared_address(&shared.full[stage]); };
    auto copy_weight = [&](uint32_t stage, uint32_t step) {
        barrier_expect(full(stage), BYTES);
        const uint32_t to = shared_address(shared.ring.weight[stage]);
        copy_weight_tile(args, to, &weight, (share.begin + step) * DEPTH, row, full(stage));
    };
    auto copy_x = [&](uint32_t stage, uint32_t step) {
        copy_tile(shared_address(shared.ring.x[stage]), &x, (share.begin + step) * DEPTH, col, full(stage));
    };
    // Weights are there already; activations may still be in the making. Where they are not, they go along with the
    // weights: behind all of them they would come late.
    const uint32_t ahead = min(STAGES, steps);
    if (elect_one()) {
        for (uint32_t step = 0; step < ahead; step++) {
            copy_weight(step, step);
            if (!dependent) copy_x(step, step);
        }
    }
    wait_for_inputs();
    if (dependent && elect_one()) {
        for (uint32_t step = 0; step < ahead; step++) copy_x(step, step);
    }
    for (uint32_t i = lane; !BLOCK && i < COLS; i += 32) {
        shared.token_scales[i] = x_scale(args, min(col + i, args.m - 1), 0);
    }
    uint32_t stage = 0, phase = 0;
    for (uint32_t step = 0; step < steps; step++) {
        if (step >= STAGES) {
            barrier_wait(shared_address(&shared.empty[stage]), phase ^ 1);
            if (elect_one()) {
                copy_weight(stage, step);
                copy_x(stage, step);
            }
        }
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
}

// Puts the scales of tokens, times that of the features, into the ring.
template <uint32_t COLS>
__device__ __forceinline__ void supply(Shared<COLS>& shared, const ScaledMm& args, Share share, uint32_t row,
                                       uint32_t col) {
    constexpr uint32_t STAGES = Shared<COLS>::STAGES, TOKENS = COLS / 32;
    const uint32_t lane = threadIdx.x % 32;
    wait_for_inputs();
    uint32_t tokens[TOKENS], stage = 0, phase = 0;
#pragma unroll
    for (uint32_t i = 0; i < TOKENS; i++) tokens[i] = col + i * 32 + lane;
    auto give = [&](const float (&scales)[TOKENS]) {
        barrier_wait(shared_address(&shared.empty[stage]), phase ^ 1);
#pragma unroll
        for (uint32_t i = 0; i < TOKENS; i++) shared.scales[stage][i * 32 + lane] = scales[i];
        __syncwarp();
        warp_arrive(shared_address(&shared.full[stage]));
        if (++stage == STAGES) stage = 0, phase ^= 1;
    };
    supply_scales<(COLS <= 64)>(args, tokens, row, share.begin, share.end, give);
}

template <uint32_t COLS, bool BLOCK>
__device__ __forceinline__ void consume(Shared<COLS>& shared, uint32_t steps, float (&total)[COLS / 2]) {
    constexpr uint32_t STAGES = Shared<COLS>::STAGES;
    // The same in all lanes, as the compiler sees by this.
    const uint32_t group = __shfl_sync(~0u, threadIdx.x / WARPGROUP, 0), lane = threadIdx.x % 32, t = lane % 4;
#pragma unroll
    for (uint32_t i = 0; i < COLS / 2; i++) total[i] = 0.0f;
    uint32_t stage = 0, phase = 0;
    for (uint32_t step = 0; step < steps; step++) {
        barrier_wait(shared_address(&shared.full[stage]), phase);
        const uint64_t a = tile_descriptor(shared_address(shared.ring.weight[stage][group * 64]));
        const uint64_t b = tile_descriptor(shared_address(shared.ring.x[stage]));
        float part[COLS / 2];
        hold(part);
        products_fence();
#pragma unroll
        for (uint32_t k = 0; k < 4; k++) multiply<COLS>(part, a + 2 * k, b + 2 * k, k > 0);
        products_commit();
        // Scales of this thread's pairs of tokens: as many as registers are left for while the tensor cores multiply.
        constexpr uint32_t PAIRS = COLS / 8, EARLY = COLS < 128 ? PAIRS : PAIRS / 2;
        float2 scales[PAIRS];
        auto load_scales = [&](uint32_t begin, uint32_t end) {
#pragma unroll
            for (uint32_t i = begin; BLOCK && i < end; i++) {
                scales[i] = *reinterpret_cast<const float2*>(&shared.scales[stage][i * 8 + t * 2]);
            }
        };
        load_scales(0, EARLY);
        products_wait<0>();
        hold(part);
        load_scales(EARLY, PAIRS);
#pragma unroll
        for (uint32_t i = 0; i < COLS / 2; i++) {
            total[i] = BLOCK ? total[i] + part[i] * (i % 2 ? scales[i / 4].y : scales[i / 4].x) : total[i] + part[i];
        }
        if constexpr (BLOCK) __syncwarp(); // all lanes have their scales
        warp_arrive(shared_address(&shared.empty[stage]));
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
}

template <uint32_t COLS, bool BLOCK>
__device__ __forceinline__ void small(const ScaledMm& args, const CUtensorMap& x, const CUtensorMap& weight,
                                      uint32_t blocks, bool dependent) {
    // At the same place in all blocks of a cluster.
    Shared<COLS>& shared = aligned_shared<Shared<COLS>>();
    constexpr uint32_t STAGES = Shared<COLS>::STAGES;
    const uint32_t rank = blockIdx.x % blocks, tile = blockIdx.x / blocks, tiles = (args.n + ROWS - 1) / ROWS;
    // Neighbours share activations.
    const uint32_t row = tile % tiles * ROWS, col = tile / tiles * COLS;
    const Share share((args.k + DEPTH - 1) / DEPTH, rank, blocks);
    if (BLOCK && threadIdx.x >= PRODUCER + 32) fetch_scales(args, row, ROWS);
    if (threadIdx.x == PRODUCER) {
        prefetch_map(&weight);
        prefetch_map(&x);
        for (uint32_t i = 0; i < STAGES; i++) {
            barrier_init(shared_address(&shared.full[i]), BLOCK ? 1 + ARRIVALS : 1);
            barrier_init(shared_address(&shared.empty[i]), CONSUMERS * 4 * ARRIVALS);
        }
        barrier_init_fence();
    }
    const Features features(args, row, !BLOCK);
    __syncthreads();
    launch_dependents();
    if (threadIdx.x >= PRODUCER + 32) {
        if constexpr (BLOCK) supply<COLS>(shared, args, share, row, col);
    } else if (threadIdx.x >= PRODUCER) {
        produce<COLS, BLOCK>(shared, args, x, weight, share, row, col, dependent);
    } else {
        float total[COLS / 2];
        consume<COLS, BLOCK>(shared, share.end - share.begin, total);
        wait_for_inputs();
        // The sums take the place of the tiles.
        named_barrier(1, CONSUMERS * WARPGROUP);
        const uint32_t warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
        for (uint32_t i = 0; i < COLS / 2; i++) {
            shared.sums[i / 4 * 8 + t * 2 + i % 2][warp * 16 + i / 2 % 2 * 8 + g] = total[i];
        }
    }
    add_up(shared.sums, args, features, col, rank, blocks,
           [&](uint32_t token) { return BLOCK ? 1.0f : shared.token_scales[token]; });
}

#define SMALL(COLS, SUFFIX, BLOCK)                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS<BLOCK>, COLS <= 64 ? 2 : 1) scaled_mm_sm90_small_##COLS##SUFFIX(      \
        const __grid_constant__ ScaledMm args, const __grid_constant__ CUtensorMap x,                                   \
        const __grid_constant__ CUtensorMap weight, uint32_t blocks, uint32_t dependent) {                             \
        small<COLS, BLOCK>(args, x, weight, blocks, dependent);                                                        \
    }

SMALL(32, , false)
SMALL(64, , false)
SMALL(128, , false)
SMALL(32, _block, true)
SMALL(64, _block, true)
SMALL(128, _block, true)
