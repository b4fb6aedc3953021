// Products of some rows of values with codes, on Hopper: too few rows for arithmetic to be all that takes time.
//
// A block computes 128 output features times TOKENS tokens over a part of K. One warp copies weights into a ring, one
// copies activations, two warpgroups multiply 64 features each. The blocks of a cluster share K out among them.

#include "sm90_split.cuh"
#include "sm90_values.cuh"

constexpr uint32_t FEATURES = SPLIT_FEATURES, CONSUMERS = FEATURES / GROUP_FEATURES;
constexpr uint32_t THREADS = CONSUMERS * WARPGROUP + 64;

template <uint32_t TOKENS>
struct Shared {
    // Two blocks fit a multiprocessor, except those of 128 tokens.
    static constexpr uint32_t WEIGHT_STAGES = TOKENS == 32 ? 5 : TOKENS == 64 ? 4 : 6;
    static constexpr uint32_t X_STAGES = TOKENS == 64 ? 5 : 7;
    union {
        Ring<FEATURES, TOKENS, WEIGHT_STAGES, X_STAGES> ring;
        float sums[TOKENS][FEATURES + 4]; // after the last product; padded against bank conflicts
    };
    Barriers<WEIGHT_STAGES> weights;
    Barriers<X_STAGES> xs;
};

template <typename T, uint32_t TOKENS, bool BLOCK>
__device__ __forceinline__ void consume(Shared<TOKENS>& shared, const ScaledMm& args, const Share& share,
                                        uint32_t row) {
    Place<Shared<TOKENS>::WEIGHT_STAGES> weight_at;
    Place<Shared<TOKENS>::X_STAGES> x_at;
    // The same in all lanes, as the compiler sees by this.
    const uint32_t group = __shfl_sync(~0u, threadIdx.x / WARPGROUP, 0);
    const uint32_t warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    // In blocks of scales, the features of a warpgroup share them.
    const uint32_t feature = min(row + group * GROUP_FEATURES, args.n - 1);
    auto step_scale = [&](uint32_t step) { return weight_scale(args, feature, (share.begin + step) * DEPTH); };
    float total[TOKENS / 2];
    multiply_tiles<T, 1, BLOCK>(shared.ring, shared.weights, shared.xs, weight_at, x_at, group, share.end - share.begin,
                                total, step_scale);
    wait_for_inputs(); // whoever wrote or read the results' memory before is done
    // The sums take the place of the tiles.
    named_barrier(1, CONSUMERS * WARPGROUP);
#pragma unroll
    for (uint32_t i = 0; i < TOKENS / 2; i++) {
        shared.sums[i / 4 * 8 + t * 2 + i % 2][warp * 16 + i / 2 % 2 * 8 + g] = total[i];
    }
}

template <typename T, uint32_t TOKENS, bool BLOCK>
__device__ __forceinline__ void values_small(const ScaledMm& args, const CUtensorMap& x, const CUtensorMap& weight,
                                             uint32_t blocks) {
    // At the same place in all blocks of a cluster.
    auto& shared = aligned_shared<Shared<TOKENS>>();
    const uint32_t rank = blockIdx.x % blocks, tile = blockIdx.x / blocks;
    const uint32_t tiles = (args.n + FEATURES - 1) / FEATURES;
    // Neighbours share activations.
    const uint32_t row = tile % tiles * FEATURES, col = tile / tiles * TOKENS;
    const Share share((args.k + DEPTH - 1) / DEPTH, rank, blocks);
    if (threadIdx.x == 0) {
        prefetch_map(&weight);
        prefetch_map(&x);
        shared.weights.init(CONSUMERS * 4); // warps
        shared.xs.init(CONSUMERS * 4);
        barrier_init_fence();
    }
    const Features features(args, row, !BLOCK);
    __syncthreads();
    launch_dependents();
    const uint32_t warp = threadIdx.x / 32;
    if (warp < CONSUMERS * 4) {
        consume<T, TOKENS, BLOCK>(shared, args, share, row);
    } else if (warp == CONSUMERS * 4) {
        // Weights are there already; activations may still be in the making.
        Place<Shared<TOKENS>::WEIGHT_STAGES> at;
        if (elect_one()) {
            copy_weights(shared.ring.weight, shared.weights, at, args, weight, row, share.begin, share.end);
        }
    } else {
        wait_for_inputs();
        Place<Shared<TOKENS>::X_STAGES> at;
        if (elect_one()) copy_x<1>(shared.ring.x, shared.xs, at, x, col, share.begin, share.end, 0);
    }
    __syncwarp();
    add_up(shared.sums, args, features, col, rank, blocks, [](uint32_t) { return 1.0f; });
}

#define VALUES(NAME, T, TOKENS, SUFFIX, BLOCK)                                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS, TOKENS == 32 || (TOKENS == 64 && !BLOCK) ? 2 : 1)            \
        scaled_mm_sm90_values_small_##NAME##_##TOKENS##SUFFIX(                                                         \
            const __grid_constant__ ScaledMm args, const __grid_constant__ CUtensorMap x,                              \
            const __grid_constant__ CUtensorMap weight, uint32_t blocks) {                                             \
        values_small<T, TOKENS, BLOCK>(args, x, weight, blocks);                                                       \
    }

#define VALUES_OF(NAME, T)                                                                                             \
    VALUES(NAME, T, 32, , false)                                                                                       \
    VALUES(NAME, T, 64, , false)                                                                                       \
    VALUES(NAME, T, 128, , false)                                                                                      \
    VALUES(NAME, T, 32, _block, true)                                                                                  \
    VALUES(NAME, T, 64, _block, true)

VALUES_OF(bf16, __nv_bfloat16)
VALUES_OF(f16, __half)
