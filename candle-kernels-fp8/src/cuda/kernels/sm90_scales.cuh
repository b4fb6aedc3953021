// Scales that change along K, on Hopper: warps of their own load them and put them into the ring beside the tiles, so that
// those who multiply neither wait for memory nor compute addresses.
#pragma once

#include "scaled_mm.cuh"
#include "sm90.cuh"

// Which scale of a row belongs to a step of 128 along K; asked for step after step.
struct Run {
    uint32_t length, index, passed; // steps

    __device__ __forceinline__ Run(uint32_t run, uint32_t step)
        : length((run + 127) / 128), index(step / length), passed(step % length) {}
    __device__ __forceinline__ void advance() {
        if (++passed == length) passed = 0, index++;
    }
};

// Has the L2 cache fetch the weight's scales of so many features from `first` on, by a warp: the first sums wait for them,
// and behind the first tiles of all blocks they would come late.
__device__ __forceinline__ void fetch_scales(const ScaledMm& args, uint32_t first, uint32_t features) {
    constexpr uint32_t LINE = 128 / sizeof(float);
    if (first >= args.n) return;
    const uint32_t last = min(first + features, args.n) - 1;
    const uint32_t begin = quotient(first, args.weight_scale_rows), end = quotient(last, args.weight_scale_rows);
    for (uint32_t i = threadIdx.x % 32 * LINE; i < args.weight_scale_row; i += 32 * LINE) {
        prefetch_line(args.weight_scales + uint64_t(begin) * args.weight_scale_row + i);
        if (end != begin) prefetch_line(args.weight_scales + uint64_t(end) * args.weight_scale_row + i);
    }
}

// Scales of four steps of 128 along K from `step` on, a multiple of 4, in [row * stride + k / run]: to[i] gets those of
// row_of(i). Past the end they are any. The number of all scales fits 32 bits.
template <uint32_t COUNT, typename RowOf>
__device__ __forceinline__ void load_steps(float (&to)[COUNT][4], const float* scales, uint32_t stride, uint32_t run,
                                           uint32_t step, uint32_t steps, RowOf row_of) {
    // Four steps of a row are 16 bytes, aligned to as much.
    if (run == 128 && stride % 4 == 0 && reinterpret_cast<uint64_t>(scales) % 16 == 0) {
        const uint32_t at = min(step, stride - 4);
#pragma unroll
        for (uint32_t i = 0; i < COUNT; i++) {
            const float4 four = *reinterpret_cast<const float4*>(scales + row_of(i) * stride + at);
            to[i][0] = four.x, to[i][1] = four.y, to[i][2] = four.z, to[i][3] = four.w;
        }
    } else {
        const Run last(run, steps - 1);
        Run at(run, step);
#pragma unroll
        for (uint32_t j = 0; j < 4; j++, at.advance()) {
#pragma unroll
            for (uint32_t i = 0; i < COUNT; i++) to[i][j] = scales[row_of(i) * stride + min(at.index, last.index)];
        }
    }
}

// Gives `give` the scales of each step of 128 along K in [begin, end), one step after the other: scales[i] is that of
// tokens[i] times that of `feature`. Loads of four steps are under way together; with AHEAD those of the next ones, too,
// at the price of as many registers again. Scales of a token lie beside each other: they come four at once where they
// may, as a load for each would keep the cache as busy as the tiles do.
template <bool AHEAD, uint32_t TOKENS, typename Give>
__device__ __forceinline__ void supply_scales(const ScaledMm& args, const uint32_t (&tokens)[TOKENS], uint32_t feature,
                                              uint32_t begin, uint32_t end, Give give) {
    constexpr uint32_t BATCH = 4;
    const bool four_at_once = args.x_scale_run == 128 && args.x_scale_row % BATCH == 0 && begin % BATCH == 0 &&
                              reinterpret_cast<uintptr_t>(args.x_scales) % sizeof(float4) == 0;
    // Places in arrays of scales: their number fits 32 bits.
    uint32_t of_tokens[TOKENS];
#pragma unroll
    for (uint32_t i = 0; i < TOKENS; i++) of_tokens[i] = min(tokens[i], args.m - 1) * args.x_scale_row;
    const uint32_t of_feature = quotient(min(feature, args.n - 1), args.weight_scale_rows) * args.weight_scale_row;
    struct Batch {
        float tokens[BATCH][TOKENS], feature[BATCH];
    };
    Run token_run(args.x_scale_run, begin), feature_run(args.weight_scale_run, begin);
    auto load = [&](Batch& batch, uint32_t base) {
        if (four_at_once) {
            // Of a last batch that is not whole, some belong to no step: rows are as long as whole ones.
#pragma unroll
            for (uint32_t i = 0; i < TOKENS; i++) {
                const float4 four = *reinterpret_cast<const float4*>(args.x_scales + of_tokens[i] + base);
                batch.tokens[0][i] = four.x, batch.tokens[1][i] = four.y;
                batch.tokens[2][i] = four.z, batch.tokens[3][i] = four.w;
            }
        }
#pragma unroll
        for (uint32_t step = 0; step < BATCH; step++) {
#pragma unroll
            for (uint32_t i = 0; i < TOKENS; i++) {
                if (!four_at_once) batch.tokens[step][i] = args.x_scales[of_tokens[i] + token_run.index];
            }
            batch.feature[step] = args.weight_scales[of_feature + feature_run.index];
            // Past the end those of the last step, unused.
            if (base + step + 1 < end) token_run.advance(), feature_run.advance();
        }
    };
    Batch now, next;
    load(now, begin);
    for (uint32_t base = begin; base < end; base += BATCH) {
        if (AHEAD && base + BATCH < end) load(next, base + BATCH);
#pragma unroll
        for (uint32_t step = 0; step < BATCH; step++) {
            if (base + step < end) {
                float scales[TOKENS];
#pragma unroll
                for (uint32_t i = 0; i < TOKENS; i++) scales[i] = now.tokens[step][i] * now.feature[step];
                give(scales);
            }
        }
        if (AHEAD) {
            now = next;
        } else if (base + BATCH < end) {
            load(now, base + BATCH);
        }
    }
}
