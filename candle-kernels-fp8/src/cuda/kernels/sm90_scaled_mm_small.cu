// Products with few rows of activations, on Hopper: more than the tensor cores' instruction of eight, fewer than what makes
// a product bound by arithmetic.
//
// A block computes 128 output features times COLS tokens over a part of K: the weight is the left factor of the
// instruction, so that any number of tokens fills it. One warp copies tiles of 128 codes along K into a ring, two warpgroups
// multiply 64 features each. The blocks of a cluster share K out among them; in the end each adds up the sums of all blocks
// for some of the tokens, always in the same order.

#include "scaled_mm.cuh"
#include "sm90.cuh"

constexpr uint32_t ROWS = 128, DEPTH = 128, CONSUMERS = 2, WARPGROUP = 128;
constexpr uint32_t THREADS = CONSUMERS * WARPGROUP + 32;

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
    float scales[STAGES][COLS]; // of a stage's tokens times that of its weights
    float token_scales[COLS];
    uint64_t full[STAGES], empty[STAGES];
};

// Steps of 128 along K that a block of a cluster takes.
struct Share {
    uint32_t begin, end;

    __device__ __forceinline__ Share(uint32_t k, uint32_t rank, uint32_t blocks) {
        const uint32_t steps = (k + DEPTH - 1) / DEPTH;
        begin = uint64_t(steps) * rank / blocks;
        end = uint64_t(steps) * (rank + 1) / blocks;
    }
};

template <uint32_t COLS, bool BLOCK>
__device__ __forceinline__ void produce(Shared<COLS>& shared, const ScaledMm& args, const CUtensorMap& x,
                                        const CUtensorMap& weight, Share share, uint32_t row, uint32_t col,
                                        bool dependent) {
    constexpr uint32_t STAGES = Shared<COLS>::STAGES, BYTES = (ROWS + COLS) * DEPTH, LANES = (COLS + 31) / 32;
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
    if (lane == 0) {
        for (uint32_t step = 0; step < ahead; step++) {
            copy_weight(step, step);
            if (!dependent) copy_x(step, step);
        }
    }
    wait_for_inputs();
    if (lane == 0 && dependent) {
        for (uint32_t step = 0; step < ahead; step++) copy_x(step, step);
    }
    for (uint32_t i = lane; !BLOCK && i < COLS; i += 32) {
        shared.token_scales[i] = x_scale(args, min(col + i, args.m - 1), 0);
    }
    float scales[LANES];
    auto load_scales = [&](uint32_t step) {
        const uint32_t k = min((share.begin + step) * DEPTH, args.k - 1);
        const float tile_scale = weight_scale(args, row, k);
        for (uint32_t i = 0; i < LANES; i++) {
            const uint32_t token = min(col + i * 32 + lane, args.m - 1);
            scales[i] = x_scale(args, token, k) * tile_scale;
        }
    };
    if constexpr (BLOCK) load_scales(0);
    uint32_t stage = 0, phase = 0;
    for (uint32_t step = 0; step < steps; step++) {
        if (step >= STAGES) {
            barrier_wait(shared_address(&shared.empty[stage]), phase ^ 1);
            if (lane == 0) {
                copy_weight(stage, step);
                copy_x(stage, step);
            }
        }
        if constexpr (BLOCK) {
            for (uint32_t i = 0; i < LANES; i++) {
                if (i * 32 + lane < COLS) shared.scales[stage][i * 32 + lane] = scales[i];
            }
            barrier_arrive(full(stage));
            load_scales(step + 1);
        }
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
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
        products_wait<0>();
        hold(part);
        if constexpr (BLOCK) {
#pragma unroll
            for (uint32_t i = 0; i < COLS / 2; i++) {
                total[i] += part[i] * shared.scales[stage][i / 4 * 8 + t * 2 + i % 2];
            }
            __syncwarp();
        } else {
#pragma unroll
            for (uint32_t i = 0; i < COLS / 2; i++) total[i] += part[i];
        }
        if (lane == 0) barrier_arrive(shared_address(&shared.empty[stage]));
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
}

// Four sums of a token, of another block of the cluster.
__device__ __forceinline__ float4 load_sums(const float* own, uint32_t block) {
    float4 sums;
    asm volatile("{ .reg .b32 remote; mapa.shared::cluster.u32 remote, %4, %5;"
                 " ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [remote]; }"
                 : "=f"(sums.x), "=f"(sums.y), "=f"(sums.z), "=f"(sums.w)
                 : "r"(shared_address(own)), "r"(block)
                 : "memory");
    return sums;
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
    const Share share(args.k, rank, blocks);
    if (threadIdx.x == THREADS - 32) {
        prefetch_map(&weight);
        prefetch_map(&x);
        for (uint32_t i = 0; i < STAGES; i++) {
            barrier_init(shared_address(&shared.full[i]), BLOCK ? 1 + 32 : 1);
            barrier_init(shared_address(&shared.empty[i]), CONSUMERS * 4);
        }
        barrier_init_fence();
    }
    // In the end a lane stores four features. What that takes is loaded now.
    const uint32_t lane = threadIdx.x % 32, feature = row + lane * 4;
    float weight_scales[4], bias[4];
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) {
        const uint32_t at = min(feature + i, args.n - 1);
        weight_scales[i] = BLOCK ? 1.0f : weight_scale(args, at, 0);
        bias[i] = args.bias ? load_float(args.bias, at, args.bias_float) : 0.0f;
    }
    __syncthreads();
    launch_dependents();
    if (threadIdx.x >= CONSUMERS * WARPGROUP) {
        produce<COLS, BLOCK>(shared, args, x, weight, share, row, col, dependent);
    } else {
        float total[COLS / 2];
        consume<COLS, BLOCK>(shared, share.end - share.begin, total);
        wait_for_inputs();
        // The sums take the place of the tiles.
        named_barrier(1, CONSUMERS * WARPGROUP);
        const uint32_t warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
#pragma unroll
        for (uint32_t i = 0; i < COLS / 2; i++) {
            shared.sums[i / 4 * 8 + t * 2 + i % 2][warp * 16 + i / 2 % 2 * 8 + g] = total[i];
        }
    }
    if (blocks > 1) {
        cluster_barrier();
    } else {
        __syncthreads();
    }
    // Each block finishes some of the tokens, a warp several at a time, so that many remote loads are under way.
    constexpr uint32_t BATCH = 4;
    for (uint32_t base = threadIdx.x / 32 * BATCH; base * blocks + rank < COLS; base += THREADS / 32 * BATCH) {
        float4 sums[BATCH] = {};
#pragma unroll 4
        for (uint32_t block = 0; block < blocks; block++) {
#pragma unroll
            for (uint32_t i = 0; i < BATCH; i++) {
                // Loads of tokens past the end repeat the last one's.
                const uint32_t token = min((base + i) * blocks + rank, COLS - 1);
                const float4 other = load_sums(&shared.sums[token][lane * 4], block);
                sums[i].x += other.x, sums[i].y += other.y, sums[i].z += other.z, sums[i].w += other.w;
            }
        }
#pragma unroll
        for (uint32_t i = 0; i < BATCH; i++) {
            const uint32_t token = (base + i) * blocks + rank;
            if (token >= COLS || col + token >= args.m) break;
            const float token_scale = BLOCK ? 1.0f : shared.token_scales[token];
            const float values[4] = {sums[i].x * (token_scale * weight_scales[0]) + bias[0],
                                     sums[i].y * (token_scale * weight_scales[1]) + bias[1],
                                     sums[i].z * (token_scale * weight_scales[2]) + bias[2],
                                     sums[i].w * (token_scale * weight_scales[3]) + bias[3]};
            const uint64_t to = uint64_t(col + token) * args.n + feature;
            if (args.n % 4 == 0 && args.out_float != F32) {
                if (feature >= args.n) continue;
                const uint2 words = make_uint2(pack2(values[0], values[1], args.out_float),
                                               pack2(values[2], values[3], args.out_float));
                *reinterpret_cast<uint2*>(static_cast<uint16_t*>(args.out) + to) = words;
            } else {
#pragma unroll
                for (uint32_t j = 0; j < 4; j++) {
                    if (feature + j < args.n) store_float(args.out, to + j, values[j], args.out_float);
                }
            }
        }
    }
    // Other blocks may still read this one's sums.
    if (blocks > 1) cluster_barrier();
}

#define SMALL(COLS, SUFFIX, BLOCK)                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS, COLS <= 64 ? 2 : 1) scaled_mm_sm90_small_##COLS##SUFFIX(      \
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
