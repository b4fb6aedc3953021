// Products with at most 64 rows of activations, on Hopper: bound by the bytes of the weight.
//
// A block takes tiles of `rows` output features, at most 64, over all of K. One warp copies the tile in boxes of 128 codes
// along K, with the activations beside them, into a ring; of each stage, two warpgroups multiply half of the boxes each.
// The weight is the left factor of the instruction, whose 64 rows may reach past the box into whatever lies behind it:
// sums of those rows are not stored. Where scales change along K, those of all activations and of a tile stay beside the
// ring, for all of K: they are few.
// Of a weight in rows, each box is a copy. Of one in panels, all boxes of a stage are one copy, or those of each panel
// are: bytes that follow each other, for which no tensor map has to be fetched before the first of them can be asked
// for. The activations of a stage are one copy too, if no box goes past the end of K: copies are few, since a start
// waits for them.
// Activations of more than 32 tokens are shared by pairs of blocks, each of which copies half of each box into the shared
// memory of both: the L2 cache could not give all of them to every multiprocessor.

#include "scaled_mm.cuh"
#include "sm90.cuh"

constexpr uint32_t DEPTH = 128, CONSUMERS = 2, WARPGROUP = 128, MOST_STAGES = 16, MOST_ROWS = 64;
constexpr uint32_t PRODUCER = CONSUMERS * WARPGROUP;

constexpr uint32_t THREADS = PRODUCER + 32; // with the warp that copies

// Boxes of a stage. Blocks that share activations.
template <uint32_t TOKENS>
constexpr uint32_t BOXES = TOKENS <= 16 ? 8 : TOKENS <= 32 ? 4 : 2;
template <uint32_t TOKENS>
constexpr uint32_t BLOCKS = TOKENS <= 32 ? 1 : 2;

template <uint32_t TOKENS>
struct alignas(1024) Shared {
    static constexpr uint32_t TILES = TOKENS <= 32 ? 2 : 1;
    float sums[TILES][CONSUMERS][TOKENS][MOST_ROWS + 4]; // of a tile and the one after it; padded against bank conflicts
    float token_scales[TOKENS];
    uint64_t full[MOST_STAGES], empty[MOST_STAGES];
};

// Where the stages of the ring are: BOXES boxes of the weight [rows, 128] for each, then as many of activations
// [TOKENS, 128]. In a stage, boxes of a weight in rows follow each other; in panels, those of each eight rows do.
template <uint32_t TOKENS>
struct Ring {
    static constexpr uint32_t BOXES = ::BOXES<TOKENS>;
    uint32_t first, rows, stages;
    uint32_t box, eight; // bytes from a box of the weight to the next, and from eight of its rows to the next eight

    __device__ __forceinline__ Ring(uint32_t first, uint32_t rows, uint32_t stages, bool panels)
        : first(first), rows(rows), stages(stages), box(panels ? ATOM_BYTES : rows * DEPTH),
          eight(panels ? BOXES * ATOM_BYTES : ATOM_BYTES) {}
    __device__ __forceinline__ uint32_t weight(uint32_t stage) const { return first + stage * BOXES * rows * DEPTH; }
    __device__ __forceinline__ uint32_t x(uint32_t stage, uint32_t box) const {
        return weight(stages) + (stage * BOXES + box) * TOKENS * DEPTH;
    }
    __device__ __forceinline__ uint32_t end() const { return x(stages, 0); }
};

// What a block does: all tiles from `first` on, `step` apart, each in `turns` of BOXES boxes. Blocks that share activations
// do as many as each other: the last tile may be one that is not there, of zeros.
struct Work {
    uint32_t first, step, end, boxes, turns;

    __device__ __forceinline__ Work(const ScaledMm& args, uint32_t rows, uint32_t boxes_of_turn, uint32_t sharing)
        : first(blockIdx.x), step(gridDim.x), end((args.n + rows * sharing - 1) / (rows * sharing) * sharing),
          boxes((args.k + DEPTH - 1) / DEPTH), turns((boxes + boxes_of_turn - 1) / boxes_of_turn) {}
};

// What one thread does: it copies weights and activations into the ring.
template <uint32_t TOKENS>
struct Producer {
    static constexpr uint32_t BOXES = ::BOXES<TOKENS>, SHARE = TOKENS / BLOCKS<TOKENS>;
    Shared<TOKENS>& shared;
    const ScaledMm& args;
    const Work& work;
    const CUtensorMap &x, &weight;
    const Ring<TOKENS>& ring;
    bool pieces; // whether a weight in panels comes panel by panel, without its map

    __device__ __forceinline__ uint32_t full(uint32_t stage) const { return shared_address(&shared.full[stage]); }
    // Turns that the ring has room for.
    __device__ __forceinline__ uint32_t ahead() const { return min(ring.stages, work.turns); }
    // Whether the map of the activations is [boxes, rows, 128]. Boxes that they do not have are zeros then, and count.
    // Halves of boxes do not follow each other.
    __device__ __forceinline__ bool whole() const { return BLOCKS<TOKENS> == 1 && args.k % DEPTH == 0; }

    // Also has the stage wait for the activations.
    __device__ __forceinline__ void copy_weight(uint32_t stage, uint32_t tile, uint32_t turn) const {
        const uint32_t boxes = min(BOXES, work.boxes - turn * BOXES);
        const uint32_t x_bytes = (whole() ? BOXES : boxes) * TOKENS * DEPTH;
        const uint32_t panel = tile * (ring.rows / PANEL_ROWS);
        if (pieces) {
            // Neither panels nor boxes that the weight does not have.
            const int32_t left = (args.n + PANEL_ROWS - 1) / PANEL_ROWS - panel;
            const uint32_t panels = min(max(left, 0), int32_t(ring.rows / PANEL_ROWS));
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
    }

    __device__ __forceinline__ void copy_x(uint32_t stage, uint32_t turn) const {
        if (whole()) {
            copy_tile(ring.x(stage, 0), &x, 0, 0, turn * BOXES, full(stage));
            return;
        }
        const uint32_t rank = blockIdx.x % BLOCKS<TOKENS>, boxes = min(BOXES, work.boxes - turn * BOXES);
#pragma unroll 1
        for (uint32_t box = 0; box < boxes; box++) {
            const uint32_t to = ring.x(stage, box) + rank * SHARE * DEPTH, k = (turn * BOXES + box) * DEPTH;
            if constexpr (BLOCKS<TOKENS> == 1) {
                copy_tile(to, &x, k, 0, full(stage));
            } else {
                copy_tile_to(to, &x, k, rank * SHARE, full(stage), (1 << BLOCKS<TOKENS>) - 1);
            }
        }
    }

    // Fills the ring. Weights are there already; activations may still be in the making. Where they are not, they go along
    // with the weights: behind all of them they would come late.
    __device__ __forceinline__ void begin(bool dependent) const {
        for (uint32_t turn = 0; turn < ahead(); turn++) {
            copy_weight(turn, work.first, turn);
            if (!dependent) copy_x(turn, turn);
        }
        if (dependent) {
            wait_for_inputs();
            for (uint32_t turn = 0; turn < ahead(); turn++) copy_x(turn, turn);
        }
    }

    __device__ __forceinline__ void go_on() const {
        uint32_t stage = ahead() % ring.stages, lap = ahead() / ring.stages;
        for (uint32_t tile = work.first; tile < work.end; tile += work.step) {
            for (uint32_t turn = tile == work.first ? ahead() : 0; turn < work.turns; turn++) {
                if (lap > 0) barrier_wait(shared_address(&shared.empty[stage]), (lap - 1) % 2);
                copy_weight(stage, tile, turn);
                copy_x(stage, turn);
                if (++stage == ring.stages) stage = 0, lap++;
            }
        }
        // The block stays until others have freed all stages here: nobody arrives at the barriers of a block that is gone.
        for (uint32_t i = 0; BLOCKS<TOKENS> > 1 && i < ring.stages; i++) {
            if (lap > 0) barrier_wait(shared_address(&shared.empty[stage]), (lap - 1) % 2);
            if (++stage == ring.stages) stage = 0, lap++;
        }
    }
};

// Has the L2 cache fetch what the first copies will be of, a line a thread: they start only when barriers are set up.
template <uint32_t TOKENS>
__device__ __forceinline__ void fetch_ahead(const ScaledMm& args, uint32_t rows) {
    constexpr uint32_t BOXES = ::BOXES<TOKENS>, LINES = BOXES * PANEL_ROWS; // LINES: of eight rows in a stage
    const uint32_t eight = threadIdx.x / LINES * PANEL_ROWS, line = threadIdx.x % LINES;
    const uint32_t row = args.panels ? 0 : line / BOXES, at = args.panels ? line : line % BOXES;
    const uint32_t first = blockIdx.x * rows + eight;
    if (eight < rows && first + PANEL_ROWS <= args.n && args.k >= BOXES * DEPTH) {
        prefetch_line(args.weight + uint64_t(first + row) * args.weight_stride + at * DEPTH);
    }
}

// Scales that change along K, beside the ring: of tokens, [boxes, PITCH]; of a tile's features and the next one's,
// [2, 2, boxes], as no more than two rows of blocks have 64 features. Blocks as long as K are scales of rows: those stay
// out of the sums until the end.
template <uint32_t TOKENS>
struct Scales {
    static constexpr uint32_t PITCH = TOKENS + 2; // neighbouring boxes of a token are in different banks
    const ScaledMm& args;
    const Ring<TOKENS>& ring;
    uint32_t boxes;
    uint32_t tokens = ring.end(), features = tokens + boxes * PITCH * 4;

    __device__ __forceinline__ bool of_rows() const { return args.weight_scale_run >= args.k; }

    // By all threads that multiply; so is the next.
    __device__ __forceinline__ void copy_features(uint32_t tile, uint32_t buffer) const {
        const uint32_t row = threadIdx.x / WARPGROUP;
        const uint32_t first = tile * ring.rows, feature = min(first + row * (ring.rows - 1), args.n - 1);
        const uint64_t start = uint64_t(quotient(feature, args.weight_scale_rows)) * args.weight_scale_row;
        for (uint32_t box = threadIdx.x % WARPGROUP; box < boxes; box += WARPGROUP) {
            const uint32_t to = features + ((buffer * 2 + row) * boxes + box) * 4, k = min(box * DEPTH, args.k - 1);
            if (of_rows()) {
                store_shared(to, 1.0f);
            } else {
                copy4(to, args.weight_scales + start + quotient(k, args.weight_scale_run));
            }
        }
    }

    __device__ __forceinline__ void copy_tokens() const {
        for (uint32_t token = threadIdx.x / 32; token < args.m; token += CONSUMERS * WARPGROUP / 32) {
            for (uint32_t box = threadIdx.x % 32; box < boxes; box += 32) {
                const uint32_t k = min(box * DEPTH, args.k - 1);
                const float* from = args.x_scales + uint64_t(token) * args.x_scale_row + quotient(k, args.x_scale_run);
                copy4(tokens + (box * PITCH + token) * 4, from);
            }
        }
    }

    // Of a feature of a tile: where its scales are.
    __device__ __forceinline__ uint32_t of_feature(uint32_t tile, uint32_t row, uint32_t buffer) const {
        const uint32_t first = tile * ring.rows;
        const uint32_t block = quotient(first, args.weight_scale_rows);
        const uint32_t second = quotient(first + row, args.weight_scale_rows) != block;
        return features + (buffer * 2 + second) * boxes * 4;
    }
};

template <uint32_t TOKENS, bool BLOCK>
__device__ __forceinline__ void consume(Shared<TOKENS>& shared, const ScaledMm& args, const Work& work,
                                        const Ring<TOKENS>& ring, const Scales<TOKENS>& scales, bool dependent) {
    constexpr uint32_t BOXES = ::BOXES<TOKENS>, OWN = BOXES / CONSUMERS;
    // Where a turn's products take long, the tensor cores have the next one's meanwhile.
    constexpr bool AHEAD = TOKENS > 16;
    // The same in all lanes, as the compiler sees by this.
    const uint32_t group = __shfl_sync(~0u, threadIdx.x / WARPGROUP, 0), thread = threadIdx.x % WARPGROUP;
    const uint32_t warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
    const uint32_t first_box = group * OWN;
    uint32_t stage = 0, lap = 0, parity = 0;
    for (uint32_t tile = work.first; tile < work.end; tile += work.step) {
        const uint32_t first = tile * ring.rows;
        // In the end a thread stores results of one feature. What that takes is loaded now.
        const uint32_t row = threadIdx.x % MOST_ROWS, feature = min(first + row, args.n - 1);
        const float feature_scale = !BLOCK || scales.of_rows() ? weight_scale(args, feature, 0) : 1.0f;
        const float bias = args.bias ? load_float(args.bias, feature, args.bias_float) : 0.0f;
        if (tile == work.first) {
            wait_for_inputs();
            if constexpr (BLOCK) {
                if (dependent) scales.copy_tokens();
                copies_wait_all();
                named_barrier(1, CONSUMERS * WARPGROUP);
            } else if (threadIdx.x < TOKENS) {
                shared.token_scales[threadIdx.x] = x_scale(args, min(threadIdx.x, args.m - 1), 0);
            }
        }
        uint32_t of_features[2];
        if constexpr (BLOCK) {
#pragma unroll
            for (uint32_t i = 0; i < 2; i++) of_features[i] = scales.of_feature(tile, warp * 16 + i * 8 + g, parity % 2);
            if (tile + work.step < work.end) scales.copy_features(tile + work.step, (parity + 1) % 2);
        }

        float total[TOKENS / 2] = {};
        struct Part {
            float sums[OWN][TOKENS / 2]; // of a turn's own boxes
        };
        auto begin = [&](Part& part) {
            barrier_wait(shared_address(&shared.full[stage]), lap % 2);
            // The tensor cores keep few bits of a sum: each box has its own. Products of one box wait for each other.
#pragma unroll
            for (uint32_t box = 0; box < OWN; box++) hold(part.sums[box]);
            products_fence();
#pragma unroll
            for (uint32_t k = 0; k < 4; k++) {
#pragma unroll
                for (uint32_t box = 0; box < OWN; box++) {
                    // Past the end of K this multiplies what the stage held before; the sums are not used.
                    const uint32_t weight = ring.weight(stage) + (first_box + box) * ring.box;
                    const uint64_t a = tile_descriptor(weight, ring.eight);
                    const uint64_t b = tile_descriptor(ring.x(stage, first_box + box));
                    multiply<TOKENS>(part.sums[box], a + 2 * k, b + 2 * k, k > 0);
                }
            }
            products_commit();
            if (++stage == ring.stages) stage = 0, lap++;
        };
        // `ago`: how many turns have begun since, that one included.
        auto finish = [&](Part& part, uint32_t turn, uint32_t ago) {
            const uint32_t of = stage >= ago ? stage - ago : stage + ring.stages - ago;
            if constexpr (BLOCKS<TOKENS> == 1) {
                if (lane == 0) barrier_arrive(shared_address(&shared.empty[of]));
            } else {
                if (lane < BLOCKS<TOKENS>) barrier_arrive_at(shared_address(&shared.empty[of]), lane);
            }
#pragma unroll
            for (uint32_t box = 0; box < OWN; box++) {
                hold(part.sums[box]);
                const uint32_t at = turn * BOXES + first_box + box;
                if (at >= work.boxes) continue;
                float of_rows[2];
#pragma unroll
                for (uint32_t i = 0; BLOCK && i < 2; i++) of_rows[i] = load_shared(of_features[i] + at * 4);
#pragma unroll
                for (uint32_t col = 0; col < TOKENS / 8; col++) {
                    float2 of_tokens;
                    if constexpr (BLOCK) of_tokens = load_shared2(scales.tokens + (at * scales.PITCH + col * 8 + t * 2) * 4);
#pragma unroll
                    for (uint32_t i = 0; i < 4; i++) {
                        const float scale = BLOCK ? of_rows[i / 2] * (i % 2 ? of_tokens.y : of_tokens.x) : 1.0f;
                        total[col * 4 + i] += part.sums[box][col * 4 + i] * scale;
                    }
                }
            }
        };
        if constexpr (AHEAD) {
            Part parts[2];
            begin(parts[0]);
            uint32_t turn = 0;
            for (; turn + 2 < work.turns; turn += 2) {
#pragma unroll
                for (uint32_t i = 0; i < 2; i++) {
                    begin(parts[1 - i]);
                    products_wait<1>();
                    finish(parts[i], turn + i, 2);
                }
            }
            if (turn + 2 == work.turns) {
                begin(parts[1]);
                products_wait<1>();
                finish(parts[0], turn++, 2);
                products_wait<0>();
                finish(parts[1], turn, 1);
            } else {
                products_wait<0>();
                finish(parts[0], turn, 1);
            }
        } else {
            Part part;
            for (uint32_t turn = 0; turn < work.turns; turn++) {
                begin(part);
                products_wait<0>();
                finish(part, turn, 1);
            }
        }

        if constexpr (BLOCK) copies_wait_all();                         // the next tile's scales, said by the barrier
        if (shared.TILES == 1) named_barrier(1, CONSUMERS * WARPGROUP); // the last tile's are not needed any more
        auto& sums = shared.sums[parity % shared.TILES];
        parity ^= 1;
#pragma unroll
        for (uint32_t i = 0; i < TOKENS / 2; i++) {
            sums[group][i / 4 * 8 + t * 2 + i % 2][warp * 16 + i / 2 % 2 * 8 + g] = total[i];
        }
        named_barrier(1, CONSUMERS * WARPGROUP);
        auto store = [&](auto* out) {
            constexpr uint32_t TOGETHER = CONSUMERS * WARPGROUP / MOST_ROWS;
#pragma unroll(TOKENS / TOGETHER < 4 ? TOKENS / TOGETHER : 4)
            for (uint32_t i = 0; i < TOKENS / TOGETHER; i++) {
                const uint32_t token = i * TOGETHER + threadIdx.x / MOST_ROWS;
                float sum = sums[0][token][row] + sums[1][token][row];
                sum *= BLOCK ? feature_scale : shared.token_scales[token] * feature_scale;
                if (token < args.m && row < ring.rows && first + row < args.n) {
                    store_as(out, uint64_t(token) * args.n + first + row, sum + bias);
                }
            }
        };
        with_type(args.out, args.out_float, store);
    }
}

template <uint32_t TOKENS, bool BLOCK>
__device__ __forceinline__ void skinny(const ScaledMm& args, const CUtensorMap& x, const CUtensorMap& weight,
                                       uint32_t rows, uint32_t stages, bool pieces, bool dependent) {
    auto& shared = aligned_shared<Shared<TOKENS>>();
    const Ring<TOKENS> ring(shared_address(&shared + 1), rows, stages, args.panels);
    const Work work(args, rows, BOXES<TOKENS>, BLOCKS<TOKENS>);
    const Scales<TOKENS> scales{args, ring, work.turns * BOXES<TOKENS>};
    if (threadIdx.x < PRODUCER) {
        fetch_ahead<TOKENS>(args, rows);
        if constexpr (BLOCK) {
            // Before all tiles: behind them they would come late.
            scales.copy_features(work.first, 0);
            if (!dependent) scales.copy_tokens();
        }
    }
    // The same in all lanes, as the compiler sees by this.
    const uint32_t warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    const bool producer = warp == PRODUCER / 32;
    // Two threads set the barriers up: the one that copies waits for no other before its first copies.
    if (producer && elect_one()) {
        for (uint32_t i = 0; i < stages; i++) barrier_init(shared_address(&shared.full[i]), 1);
        barrier_init_fence();
    } else if (warp == 0 && elect_one()) {
        for (uint32_t i = 0; i < stages; i++) {
            barrier_init(shared_address(&shared.empty[i]), CONSUMERS * 4 * BLOCKS<TOKENS>); // warps
        }
        barrier_init_fence();
    } else if (warp == 1 && elect_one()) {
        if (!pieces) prefetch_map(&weight);
        prefetch_map(&x);
    }
    __syncwarp();
    if constexpr (BLOCKS<TOKENS> > 1) {
        cluster_barrier_relaxed();
    } else if (producer) {
        named_barrier_arrive(2, THREADS);
    } else {
        named_barrier(2, THREADS);
    }
    launch_dependents();
    if (producer) {
        const Producer<TOKENS> producer{shared, args, work, x, weight, ring, pieces};
        if (elect_one()) producer.begin(dependent);
        __syncwarp();
        if (BLOCKS<TOKENS> == 1) named_barrier(3, PRODUCER + 32);
        if (elect_one()) producer.go_on();
    } else {
        if (BLOCKS<TOKENS> == 1) named_barrier_arrive(3, PRODUCER + 32);
        consume<TOKENS, BLOCK>(shared, args, work, ring, scales, dependent);
    }
}

#define SKINNY(TOKENS, SUFFIX, BLOCK)                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) scaled_mm_sm90_skinny_##TOKENS##SUFFIX(           \
        const __grid_constant__ ScaledMm args, const __grid_constant__ CUtensorMap x,                                   \
        const __grid_constant__ CUtensorMap weight, uint32_t rows, uint32_t stages, uint32_t pieces,                   \
        uint32_t dependent) {                                                                                          \
        skinny<TOKENS, BLOCK>(args, x, weight, rows, stages, pieces, dependent);                                       \
    }

SKINNY(8, , false)
SKINNY(16, , false)
SKINNY(32, , false)
SKINNY(64, , false)
SKINNY(8, _block, true)
SKINNY(16, _block, true)
SKINNY(32, _block, true)
SKINNY(64, _block, true)
