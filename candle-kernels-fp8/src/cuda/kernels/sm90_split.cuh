// Products whose K is shared out among the blocks of a cluster: each block's sums of 128 features by some tokens lie in
// its shared memory, and are added up in the end.
#pragma once

#include "scaled_mm.cuh"
#include "sm90.cuh"

// Steps along K that a block of a cluster takes.
struct Share {
    uint32_t begin, end;

    __device__ __forceinline__ Share(uint32_t steps, uint32_t rank, uint32_t blocks)
        : begin(uint64_t(steps) * rank / blocks), end(uint64_t(steps) * (rank + 1) / blocks) {}
};

constexpr uint32_t SPLIT_FEATURES = 128;

// The four features of which a lane stores results, from `feature` on, and what they take.
struct Features {
    uint32_t feature;
    float scales[4], bias[4];

    // If not `scaled`, scales are in the sums already.
    __device__ __forceinline__ Features(const ScaledMm& args, uint32_t first, bool scaled)
        : feature(first + threadIdx.x % 32 * 4) {
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            const uint32_t at = min(feature + i, args.n - 1);
            scales[i] = scaled ? weight_scale(args, at, 0) : 1.0f;
            bias[i] = args.bias ? load_float(args.bias, at, args.bias_float) : 0.0f;
        }
    }
};

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

// By all threads of all blocks of a cluster, which have written their sums: adds them up, always in the same order, and
// stores results, those of some of the tokens from `col` on by each block. `token_scale` is that of a token of the
// tile.
template <uint32_t COLS, typename F>
__device__ __forceinline__ void add_up(const float (&own)[COLS][SPLIT_FEATURES + 4], const ScaledMm& args,
                                       const Features& features, uint32_t col, uint32_t rank, uint32_t blocks,
                                       F token_scale) {
    if (blocks > 1) {
        cluster_barrier();
    } else {
        __syncthreads();
    }
    const uint32_t lane = threadIdx.x % 32, feature = features.feature;
    // A warp finishes several tokens at a time, so that many remote loads are under way.
    constexpr uint32_t BATCH = 4;
    for (uint32_t base = threadIdx.x / 32 * BATCH; base * blocks + rank < COLS; base += blockDim.x / 32 * BATCH) {
        float4 sums[BATCH] = {};
#pragma unroll 4
        for (uint32_t block = 0; block < blocks; block++) {
#pragma unroll
            for (uint32_t i = 0; i < BATCH; i++) {
                // Loads of tokens past the end repeat the last one's.
                const uint32_t token = min((base + i) * blocks + rank, COLS - 1);
                const float4 other = load_sums(&own[token][lane * 4], block);
                sums[i].x += other.x, sums[i].y += other.y, sums[i].z += other.z, sums[i].w += other.w;
            }
        }
#pragma unroll
        for (uint32_t i = 0; i < BATCH; i++) {
            const uint32_t token = (base + i) * blocks + rank;
            if (token >= COLS || col + token >= args.m) break;
            const float scale = token_scale(token);
            const float values[4] = {sums[i].x * (scale * features.scales[0]) + features.bias[0],
                                     sums[i].y * (scale * features.scales[1]) + features.bias[1],
                                     sums[i].z * (scale * features.scales[2]) + features.bias[2],
                                     sums[i].w * (scale * features.scales[3]) + features.bias[3]};
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
