// Products with at most 32 rows of activations, on Hopper: bound by the bytes of the weight.
//
// A block takes tiles of `rows` output features, at most 64, over all of K, so many that every multiprocessor gets
// about the same number of bytes. One warp copies the tile in boxes of 128 codes along K, with the activations beside
// them, into a ring; two warpgroups take turns with its stages. The weight is the left factor of the instruction, whose
// 64 rows may reach past the box into whatever lies behind it: sums of those rows are not stored.
// Of a weight in rows, each box is a copy. Of one in panels, all boxes of a stage are one copy, or those of each panel
// are: bytes that follow each other, for which no tensor map has to be fetched before the first of them can be asked
// for. The activations of a stage are one copy too, if no box goes past the end of K: copies are few, since a start
// waits for them.

#include "scaled_mm.cuh"
#include "sm90.cuh"

constexpr uint32_t DEPTH = 128, BOXES = 4, CONSUMERS = 2, WARPGROUP = 128, MOST_STAGES = 16, MOST_ROWS = 64;

template <uint32_t TOKENS>
struct alignas(1024) Shared {
    float sums[2][CONSUMERS][TOKENS][MOST_ROWS + 4]; // of a tile and the one after it; padded against bank conflicts
    float token_scales[TOKENS];
    uint64_t full[MOST_STAGES], empty[MOST_STAGES];
};

// Where the stages of the ring are: BOXES boxes of the weight [rows, 128] for each, then as many of activations
// [TOKENS, 128]. In a stage, boxes of a weight in rows follow each other; in panels, those of each eight rows do.
template <uint32_t TOKENS>
struct Ring {
    uint32_t first, rows, stages;
    uint32_t box, eight; // bytes from a box of the weight to the next, and from eight of its rows to the next eight

    __device__ __forceinline__ Ring(uint32_t first, uint32_t rows, uint32_t stages, bool panels)
        : first(first), rows(rows), stages(stages), box(panels ? ATOM_BYTES : rows * DEPTH),
          eight(panels ? BOXES * ATOM_BYTES : ATOM_BYTES) {}
    __device__ __forceinline__ uint32_t weight(uint32_t stage) const { return first + stage * BOXES * rows * DEPTH; }
    __device__ __forceinline__ uint32_t x(uint32_t stage, uint32_t box) const {
        return weight(stages) + (stage * BOXES + box) * TOKENS * DEPTH;
    }
};

// What a block does: all tiles from `first` on, `step` apart, each in `turns` of BOXES boxes.
struct Work {
    uint32_t first, step, end, boxes, turns;

    __device__ __forceinline__ Work(const ScaledMm& args, uint32_t rows)
        : first(blockIdx.x), step(gridDim.x), end((args.n + rows - 1) / rows), boxes((args.k + DEPTH - 1) / DEPTH),
          turns((boxes + BOXES - 1) / BOXES) {}
};

// `pieces`: whether a weight in panels comes panel by panel, without its map.
template <uint32_t TOKENS>
__device__ __forceinline__ void produce(Shared<TOKENS>& shared, const ScaledMm& args, const Work& work,
                                        const CUtensorMap& x, const CUtensorMap& weight, const Ring<TOKENS>& ring,
                                        bool pieces, bool dependent) {
    auto full = [&](uint32_t stage) { return shared_address(&shared.full[stage]); };
    // The map of the activations is [boxes, rows, 128] then, and boxes that they do not have are zeros, and count.
    const bool whole = args.k % DEPTH == 0;
    // Also has the stage wait for the activations.
    auto copy_weight = [&](uint32_t stage, uint32_t tile, uint32_t turn) {
        const uint32_t boxes = min(BOXES, work.boxes - turn * BOXES);
        const uint32_t x_bytes = (whole ? BOXES : boxes) * TOKENS * DEPTH;
        const uint32_t panel = tile * (ring.rows / PANEL_ROWS);
        if (pieces) {
            // Neither panels nor boxes that the weight does not have.
            const uint32_t panels = min(ring.rows / PANEL_ROWS, (args.n + PANEL_ROWS - 1) / PANEL_ROWS - panel);
            const uint64_t panel_bytes = PANEL_ROWS * uint64_t(args.weight_stride);
            const uint8_t* from = args.weight + panel * panel_bytes + uint64_t(turn) * (BOXES * ATOM_BYTES);
            barrier_expect(full(stage), panels * boxes * ATOM_BYTES + x_bytes);
#pragma unroll 1
            for (uint32_t i = 0; i < panels; i++) {
                copy_bytes(ring.weight(stage) + i * ring.eight, from, boxes * ATOM_BYTES, full(stage));
                from += panel_bytes;
            }
        } else if (args.panels) {
            // Those that the weight does not have are zeros, and count.
            barrier_expect(full(stage), BOXES * ring.rows * DEPTH + x_bytes);
            copy_tile(ring.weight(stage), &weight, 0, turn * BOXES, panel, full(stage));
        } else {
            barrier_expect(full(stage), boxes * ring.rows * DEPTH + x_bytes);
#pragma unroll 1
            for (uint32_t box = 0; box < boxes; box++) {
                const uint32_t to = ring.weight(stage) + box * ring.box;
                copy_tile(to, &weight, (turn * BOXES + box) * DEPTH, tile * ring.rows, full(stage));
            }
        }
    };
    auto copy_x = [&](uint32_t stage, uint32_t turn) {
        if (whole) {
            copy_tile(ring.x(stage, 0), &x, 0, 0, turn * BOXES, full(stage));
            return;
        }
        const uint32_t boxes = min(BOXES, work.boxes - turn * BOXES);
#pragma unroll 1
        for (uint32_t box = 0; box < boxes; box++) {
            copy_tile(ring.x(stage, box), &x, (turn * BOXES + box) * DEPTH, 0, full(stage));
        }
    };
    // Weights are there already; activations may still be in the making. Where they are not, they go along with the
    // weights: behind all of them they would come late.
    const uint32_t ahead = min(ring.stages, work.turns);
    for (uint32_t turn = 0; turn < ahead; turn++) {
        copy_weight(turn, work.first, turn);
        if (!dependent) copy_x(turn, turn);
    }
    if (dependent) {
        wait_for_inputs();
        for (uint32_t turn = 0; turn < ahead; turn++) copy_x(turn, turn);
    }
    uint32_t stage = ahead % ring.stages, lap = ahead / ring.stages;
    for (uint32_t tile = work.first; tile < work.end; tile += work.step) {
        for (uint32_t turn = tile == work.first ? ahead : 0; turn < work.turns; turn++) {
            if (lap > 0) barrier_wait(shared_address(&shared.empty[stage]), (lap - 1) % 2);
            copy_weight(stage, tile, turn);
            copy_x(stage, turn);
            if (++stage == ring.stages) stage = 0, lap++;
        }
    }
}

// Boxes in a run of K that shares a scale.
__device__ __forceinline__ uint32_t boxes_of(uint32_t run) { return (run + DEPTH - 1) / DEPTH; }

template <uint32_t TOKENS, bool BLOCK>
__device__ __forceinline__ void consume(Shared<TOKENS>& shared, const ScaledMm& args, const Work& work,
                                        const Ring<TOKENS>& ring) {
    // The same in all lanes, as the compiler sees by this.
    const uint32_t group = __shfl_sync(~0u, threadIdx.x / WARPGROUP, 0), thread = threadIdx.x % WARPGROUP;
    const uint32_t warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
    // The ring has an even number of stages, so a warpgroup's turns are always on the same ones.
    uint32_t stage = group, lap = 0, turn = group, parity = 0;
    for (uint32_t tile = work.first; tile < work.end; tile += work.step) {
        const uint32_t first = tile * ring.rows;
        // In the end a thread stores results of one feature. What that takes is loaded now.
        const uint32_t row = threadIdx.x % MOST_ROWS, feature = min(first + row, args.n - 1);
        const float feature_scale = BLOCK ? 1.0f : weight_scale(args, feature, 0);
        const float bias = args.bias ? load_float(args.bias, feature, args.bias_float) : 0.0f;
        if (tile == work.first) {
            wait_for_inputs();
            if (!BLOCK && threadIdx.x < TOKENS) {
                shared.token_scales[threadIdx.x] = x_scale(args, min(threadIdx.x, args.m - 1), 0);
            }
        }

        // With BLOCK, the scales of this thread's rows and tokens, one after the other along K.
        const float *row_scales[2], *token_scales[TOKENS / 4];
        const uint32_t row_run = boxes_of(args.weight_scale_run), token_run = boxes_of(args.x_scale_run);
        if constexpr (BLOCK) {
#pragma unroll
            for (uint32_t i = 0; i < 2; i++) {
                const uint32_t at = min(first + warp * 16 + i * 8 + g, args.n - 1);
                row_scales[i] = args.weight_scales + uint64_t(at / args.weight_scale_rows) * args.weight_scale_row;
            }
#pragma unroll
            for (uint32_t i = 0; i < TOKENS / 4; i++) {
                const uint32_t token = min(i / 2 * 8 + t * 2 + i % 2, args.m - 1);
                token_scales[i] = args.x_scales + uint64_t(token) * args.x_scale_row;
            }
        }

        float total[TOKENS / 2] = {};
        for (; turn < work.turns; turn += CONSUMERS) {
            float of_rows[BOXES][2], of_tokens[BOXES][TOKENS / 4];
            if constexpr (BLOCK) {
#pragma unroll
                for (uint32_t box = 0; box < BOXES; box++) {
                    const uint32_t at = min(turn * BOXES + box, work.boxes - 1);
                    const uint32_t row_at = quotient(at, row_run), token_at = quotient(at, token_run);
#pragma unroll
                    for (uint32_t i = 0; i < 2; i++) of_rows[box][i] = row_scales[i][row_at];
#pragma unroll
                    for (uint32_t i = 0; i < TOKENS / 4; i++) of_tokens[box][i] = token_scales[i][token_at];
                }
            }
            barrier_wait(shared_address(&shared.full[stage]), lap % 2);
            const uint32_t boxes = min(BOXES, work.boxes - turn * BOXES);
            // The tensor cores keep few bits of a sum: each box has its own.
            float parts[BOXES][TOKENS / 2];
#pragma unroll
            for (uint32_t box = 0; box < BOXES; box++) hold(parts[box]);
            products_fence();
#pragma unroll
            for (uint32_t box = 0; box < BOXES; box++) {
                // Past the end of K this multiplies what the stage held before; the sums are not used.
                const uint64_t a = tile_descriptor(ring.weight(stage) + box * ring.box, ring.eight);
                const uint64_t b = tile_descriptor(ring.x(stage, box));
#pragma unroll
                for (uint32_t k = 0; k < 4; k++) multiply<TOKENS>(parts[box], a + 2 * k, b + 2 * k, k > 0);
            }
            products_commit();
            products_wait<0>();
            if (lane == 0) barrier_arrive(shared_address(&shared.empty[stage]));
#pragma unroll
            for (uint32_t box = 0; box < BOXES; box++) {
                hold(parts[box]);
                if (box < boxes) {
#pragma unroll
                    for (uint32_t i = 0; i < TOKENS / 2; i++) {
                        float part = parts[box][i];
                        if constexpr (BLOCK) part *= of_rows[box][i / 2 % 2] * of_tokens[box][i / 4 * 2 + i % 2];
                        total[i] += part;
                    }
                }
            }
            stage += CONSUMERS;
            if (stage >= ring.stages) stage -= ring.stages, lap++;
        }
        turn -= work.turns;

        auto& sums = shared.sums[parity];
        parity ^= 1;
#pragma unroll
        for (uint32_t i = 0; i < TOKENS / 2; i++) {
            sums[group][i / 4 * 8 + t * 2 + i % 2][warp * 16 + i / 2 % 2 * 8 + g] = total[i];
        }
        named_barrier(1, CONSUMERS * WARPGROUP);
        for (uint32_t token = threadIdx.x / MOST_ROWS; token < args.m; token += CONSUMERS * WARPGROUP / MOST_ROWS) {
            float sum = sums[0][token][row] + sums[1][token][row];
            if constexpr (!BLOCK) sum *= shared.token_scales[token] * feature_scale;
            if (row < ring.rows && first + row < args.n) {
                store_float(args.out, uint64_t(token) * args.n + first + row, sum + bias, args.out_float);
            }
        }
        __syncwarp();
    }
}

template <uint32_t TOKENS, bool BLOCK>
__device__ __forceinline__ void skinny(const ScaledMm& args, const CUtensorMap& x, const CUtensorMap& weight,
                                       uint32_t rows, uint32_t stages, bool pieces, bool dependent) {
    auto& shared = aligned_shared<Shared<TOKENS>>();
    const Ring<TOKENS> ring(shared_address(&shared + 1), rows, stages, args.panels);
    if (threadIdx.x == CONSUMERS * WARPGROUP) {
        if (!pieces) prefetch_map(&weight);
        prefetch_map(&x);
        for (uint32_t i = 0; i < stages; i++) {
            barrier_init(shared_address(&shared.full[i]), 1);
            barrier_init(shared_address(&shared.empty[i]), 4); // warps
        }
        barrier_init_fence();
    }
    __syncthreads();
    launch_dependents();
    const Work work(args, rows);
    if (threadIdx.x < CONSUMERS * WARPGROUP) {
        consume<TOKENS, BLOCK>(shared, args, work, ring);
    } else if (threadIdx.x == CONSUMERS * WARPGROUP) {
        produce<TOKENS>(shared, args, work, x, weight, ring, pieces, dependent);
    }
}

#define SKINNY(TOKENS, SUFFIX, BLOCK)                                                                                  \
    extern "C" __global__ void __launch_bounds__(288, 1) scaled_mm_sm90_skinny_##TOKENS##SUFFIX(                        \
        const __grid_constant__ ScaledMm args, const __grid_constant__ CUtensorMap x,                                   \
        const __grid_constant__ CUtensorMap weight, uint32_t rows, uint32_t stages, uint32_t pieces,                   \
        uint32_t dependent) {                                                                                          \
        skinny<TOKENS, BLOCK>(args, x, weight, rows, stages, pieces, dependent);                                       \
    }

SKINNY(8, , false)
SKINNY(16, , false)
SKINNY(32, , false)
SKINNY(8, _block, true)
SKINNY(16, _block, true)
