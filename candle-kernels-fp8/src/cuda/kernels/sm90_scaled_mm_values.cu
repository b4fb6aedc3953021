// Products of many rows of values with codes, on Hopper.
//
// A pair of blocks computes TOKENS tokens times 2 FEATURES output features, FEATURES a block: both need the same
// activations, so each copies half of them into the shared memory of both. One warp copies weights into a ring, one
// copies activations, and each of the other warpgroups multiplies 64 features with all tokens. Sums stay in the tensor
// cores' registers, where they lose nothing: products of values are added in f32.
// Blocks stay and take tile after tile; tiles that are computed at the same time share rows and columns, for the L2
// cache.

#include "sm90_values.cuh"

constexpr uint32_t PAIR = 2, TOGETHER = 2048; // TOGETHER: tokens whose tiles are computed together
constexpr uint32_t PART = 64;                 // tokens whose results are stored at a time

template <uint32_t FEATURES, uint32_t TOKENS>
struct Shared {
    // What is left of 227 KiB.
    static constexpr uint32_t WEIGHT_STAGES = TOKENS == 256 ? 3 : TOKENS == 64 ? 5 : 4;
    static constexpr uint32_t X_STAGES = TOKENS == 256 ? 5 : TOKENS == 128 && FEATURES == 192 ? 6 : 8;
    Ring<FEATURES, TOKENS, WEIGHT_STAGES, X_STAGES> ring;
    alignas(16) uint16_t results[FEATURES / GROUP_FEATURES][PART][GROUP_FEATURES]; // of a warpgroup
    Barriers<WEIGHT_STAGES> weights;
    Barriers<X_STAGES> xs;
};

// The tiles of a pair of blocks, in the order of `tile`.
template <uint32_t FEATURES, uint32_t TOKENS>
struct Tiles {
    static constexpr uint32_t HEIGHT = TOGETHER / TOKENS;
    uint32_t rows, pairs; // tiles along M; pairs of tiles along N

    __device__ __forceinline__ explicit Tiles(const ScaledMm& args)
        : rows((args.m + TOKENS - 1) / TOKENS), pairs((args.n + PAIR * FEATURES - 1) / (PAIR * FEATURES)) {}
    // Calls with the first token and the first feature of each tile of this block.
    template <typename F>
    __device__ __forceinline__ void each(uint32_t rank, F f) const {
        for (uint32_t tile = blockIdx.x / PAIR; tile < rows * pairs; tile += gridDim.x / PAIR) {
            // A group of tiles of rows goes through all columns together.
            const uint32_t group = tile / (HEIGHT * pairs), within = tile % (HEIGHT * pairs);
            const uint32_t height = min(HEIGHT, rows - group * HEIGHT);
            const uint32_t row = group * HEIGHT + within % height, pair = within / height;
            f(row * TOKENS, (pair * PAIR + rank) * FEATURES);
        }
    }
};

// Stores four matrices [8, 8] of 16-bit values as `store_matrices` does, but transposed: word w of lane 4 g + t is
// column g of rows 2 t and 2 t + 1 of matrix w.
__device__ __forceinline__ void store_columns(void* row, const uint32_t (&words)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
                 "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
}

// By a warpgroup: stores its results, of TOKENS tokens from `token` on and of 64 features from `feature` on. `result`
// gives those that a lane holds, in the order of its sums.
template <uint32_t TOKENS, typename F>
__device__ __forceinline__ void store(uint16_t (&results)[PART][GROUP_FEATURES], const ScaledMm& args, uint32_t token,
                                      uint32_t feature, uint32_t group, F result) {
    const uint32_t thread = threadIdx.x % WARPGROUP, warp = thread / 32, lane = threadIdx.x % 32;
    if (args.out_float == F32) {
        const uint32_t g = lane / 4, t = lane % 4;
#pragma unroll
        for (uint32_t i = 0; i < TOKENS / 2; i++) {
            const uint32_t row = token + i / 4 * 8 + t * 2 + i % 2, col = feature + warp * 16 + i / 2 % 2 * 8 + g;
            const float value = result(i);
            if (row < args.m && col < args.n) static_cast<float*>(args.out)[uint64_t(row) * args.n + col] = value;
        }
        return;
    }
    // Through shared memory, so that eight lanes write 128 bytes of a row. Pieces of eight features change places by
    // the token, against bank conflicts.
    constexpr uint32_t PIECES = GROUP_FEATURES / 8;
    uint16_t* const out = static_cast<uint16_t*>(args.out) + uint64_t(token) * args.n + feature;
    const uint32_t tokens = token < args.m ? args.m - token : 0, features = feature < args.n ? args.n - feature : 0;
#pragma unroll
    for (uint32_t part = 0; part < TOKENS; part += PART) {
        named_barrier(1 + group, WARPGROUP); // the part before is stored
#pragma unroll
        for (uint32_t j = 0; j < PART / 16; j++) {
            uint32_t words[4]; // eight features of eight tokens, features first
#pragma unroll
            for (uint32_t w = 0; w < 4; w++) {
                const uint32_t i = part / 2 + j * 8 + w / 2 * 4 + w % 2 * 2;
                words[w] = pack2(result(i), result(i + 1), args.out_float);
            }
            const uint32_t piece = warp * 2 + lane / 8 % 2;
            store_columns(&results[j * 16 + lane / 16 * 8 + lane % 8][(piece ^ lane % 8) * 8], words);
        }
        named_barrier(1 + group, WARPGROUP);
        if (args.n % 8 == 0) {
#pragma unroll
            for (uint32_t i = thread; i < PART * PIECES; i += WARPGROUP) {
                const uint32_t row = i / PIECES, piece = i % PIECES;
                if (part + row < tokens && piece * 8 < features) {
                    const uint4 value = *reinterpret_cast<const uint4*>(&results[row][(piece ^ row % 8) * 8]);
                    *reinterpret_cast<uint4*>(out + uint64_t(part + row) * args.n + piece * 8) = value;
                }
            }
        } else {
            for (uint32_t i = thread; i < PART * GROUP_FEATURES; i += WARPGROUP) {
                const uint32_t row = i / GROUP_FEATURES, col = i % GROUP_FEATURES;
                if (part + row < tokens && col < features) {
                    out[uint64_t(part + row) * args.n + col] = results[row][(col / 8 ^ row % 8) * 8 + col % 8];
                }
            }
        }
    }
}

template <typename T, uint32_t FEATURES, uint32_t TOKENS, bool BLOCK>
__device__ __forceinline__ void consume(Shared<FEATURES, TOKENS>& shared, const ScaledMm& args, uint32_t rank) {
    using Sizes = Shared<FEATURES, TOKENS>;
    const uint32_t steps = (args.k + DEPTH - 1) / DEPTH;
    // The same in all lanes, as the compiler sees by this, so that addresses of tiles are computed once a warp.
    const uint32_t group = __shfl_sync(~0u, threadIdx.x / WARPGROUP - 1, 0);
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    Place<Sizes::WEIGHT_STAGES> weight_at;
    Place<Sizes::X_STAGES> x_at;
    Tiles<FEATURES, TOKENS>(args).each(rank, [&](uint32_t token, uint32_t first_feature) {
        const uint32_t feature = first_feature + group * GROUP_FEATURES;
        // Of the two features of a lane; loaded before they are needed.
        float scale[2], bias[2];
#pragma unroll
        for (uint32_t c = 0; c < 2; c++) {
            const uint32_t col = min(feature + warp * 16 + c * 8 + lane / 4, args.n - 1);
            scale[c] = BLOCK ? 1.0f : weight_scale(args, col, 0);
            bias[c] = args.bias ? load_float(args.bias, col, args.bias_float) : 0.0f;
        }
        // In blocks of scales, the features of a warpgroup share them.
        const uint32_t row = min(feature, args.n - 1);
        auto step_scale = [&](uint32_t step) { return weight_scale(args, row, step * DEPTH); };
        float total[TOKENS / 2];
        multiply_tiles<T, PAIR, BLOCK>(shared.ring, shared.weights, shared.xs, weight_at, x_at, group, steps, total,
                                       step_scale);
        auto result = [&](uint32_t i) { return fmaf(total[i], scale[i / 2 % 2], bias[i / 2 % 2]); };
        store<TOKENS>(shared.results[group], args, token, feature, group, result);
    });
}

template <typename T, uint32_t FEATURES, uint32_t TOKENS, bool BLOCK>
__device__ __forceinline__ void values(const ScaledMm& args, const CUtensorMap& x, const CUtensorMap& weight) {
    using Sizes = Shared<FEATURES, TOKENS>;
    constexpr uint32_t GROUPS = FEATURES / GROUP_FEATURES;
    static_assert(sizeof(Sizes) + 1024 <= 227 * 1024);
    auto& shared = aligned_shared<Sizes>();
    const uint32_t rank = cluster_rank();
    if (threadIdx.x == 0) {
        prefetch_map(&x);
        prefetch_map(&weight);
        shared.weights.init(GROUPS * 4);   // warps
        shared.xs.init(GROUPS * 4 * PAIR); // of both blocks
        barrier_init_fence();
    }
    cluster_barrier();
    launch_dependents();
    wait_for_inputs();
    if (threadIdx.x < WARPGROUP) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(GROUPS == 2 ? 40 : 32));
        const Tiles<FEATURES, TOKENS> tiles(args);
        const uint32_t steps = (args.k + DEPTH - 1) / DEPTH;
        const uint32_t warp = threadIdx.x / 32;
        if (warp == 0 && elect_one()) {
            Place<Sizes::WEIGHT_STAGES> at;
            tiles.each(rank, [&](uint32_t, uint32_t feature) {
                copy_weights(shared.ring.weight, shared.weights, at, args, weight, feature, 0, steps);
            });
        } else if (warp == 1 && elect_one()) {
            Place<Sizes::X_STAGES> at;
            tiles.each(rank, [&](uint32_t token, uint32_t) {
                copy_x<PAIR>(shared.ring.x, shared.xs, at, x, token, 0, steps, rank);
            });
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(GROUPS == 2 ? 232 : 160));
        consume<T, FEATURES, TOKENS, BLOCK>(shared, args, rank);
    }
    __syncwarp();
    // The other block may still copy into this one's memory and arrive at its barriers.
    cluster_barrier();
}

#define VALUES(NAME, T, FEATURES, TOKENS, SUFFIX, BLOCK)                                                               \
    extern "C" __global__ void __launch_bounds__((FEATURES / GROUP_FEATURES + 1) * WARPGROUP, 1)                       \
        scaled_mm_sm90_values_##NAME##_##FEATURES##x##TOKENS##SUFFIX(                                                  \
            const __grid_constant__ ScaledMm args, const __grid_constant__ CUtensorMap x,                              \
            const __grid_constant__ CUtensorMap weight) {                                                              \
        values<T, FEATURES, TOKENS, BLOCK>(args, x, weight);                                                           \
    }

#define VALUES_OF(NAME, T)                                                                                             \
    VALUES(NAME, T, 128, 256, , false)                                                                                 \
    VALUES(NAME, T, 192, 128, , false)                                                                                 \
    VALUES(NAME, T, 128, 128, , false)                                                                                 \
    VALUES(NAME, T, 192, 64, , false)                                                                                  \
    VALUES(NAME, T, 128, 128, _block, true)

VALUES_OF(bf16, __nv_bfloat16)
VALUES_OF(f16, __half)
