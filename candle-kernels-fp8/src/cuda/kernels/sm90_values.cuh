// Products of values with codes, on Hopper: a warpgroup widens its 64 rows of the weight in registers, where they are
// the left factors of the instructions. Activations, the right factors, stay in shared memory as they are.
#pragma once

#include "mma.cuh"
#include "scaled_mm.cuh"
#include "sm90.cuh"

constexpr uint32_t WARPGROUP = 128, GROUP_FEATURES = 64;
constexpr uint32_t DEPTH = 128; // codes of a tile along K; activations come in halves of it, 128 bytes
constexpr uint32_t HALF_BYTES = 128;

// Two codes, the lower one in the lowest byte, from `OFFSET` bytes past an address in shared memory.
template <int OFFSET>
__device__ __forceinline__ uint32_t load_codes(uint32_t address) {
    uint32_t codes;
    asm volatile("ld.shared.u16 %0, [%1 + %2];" : "=r"(codes) : "r"(address), "n"(OFFSET));
    return codes;
}

// --- Warpgroup products: D[64, N] = A[64, 16] * B[N, 16]^T, A in registers ---

// Lane 4 g + t of warp w holds, of A, columns 2 t and 2 t + 1 of rows 16 w + g and 16 w + g + 8 in the first two words,
// and columns 2 t + 8 and 2 t + 9 in the others. D lies as `multiply` says; a step of 16 along K adds 2 to `b`.
template <typename T, int N>
__device__ __forceinline__ void multiply_values(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool add);

#define SUMS_32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define SUMS_64                                                                                                        \
    SUMS_32                                                                                                            \
    ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SUMS_128                                                                                                       \
    SUMS_64                                                                                                            \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"                                 \
    ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SUMS_256                                                                                                       \
    SUMS_128                                                                                                           \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"                                 \
    ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"                                 \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"                     \
    ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define REF_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define REF_16(d, i) REF_4(d, i), REF_4(d, i + 4), REF_4(d, i + 8), REF_4(d, i + 12)
#define REFS_32(d) REF_16(d, 0)
#define REFS_64(d) REF_16(d, 0), REF_16(d, 16)
#define REFS_128(d) REFS_64(d), REF_16(d, 32), REF_16(d, 48)
#define REFS_256(d) REFS_128(d), REF_16(d, 64), REF_16(d, 80), REF_16(d, 96), REF_16(d, 112)

// A0 to ADD: the numbers of the operands after those of D.
#define MULTIPLY_VALUES(T, NAME, N, A0, A1, A2, A3, B, ADD)                                                            \
    template <>                                                                                                        \
    __device__ __forceinline__ void multiply_values<T, N>(float(&d)[N / 2], const uint32_t(&a)[4], uint64_t b,         \
                                                          bool add) {                                                  \
        asm volatile("{ .reg .pred add; setp.ne.b32 add, " ADD ", 0;"                                                  \
                     " wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" SUMS_##N "}, "              \
                     "{" A0 ", " A1 ", " A2 ", " A3 "}, " B ", add, 1, 1, 0; }"                                        \
                     : REFS_##N(d)                                                                                     \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)));                             \
    }

MULTIPLY_VALUES(__nv_bfloat16, "bf16", 32, "%16", "%17", "%18", "%19", "%20", "%21")
MULTIPLY_VALUES(__nv_bfloat16, "bf16", 64, "%32", "%33", "%34", "%35", "%36", "%37")
MULTIPLY_VALUES(__nv_bfloat16, "bf16", 128, "%64", "%65", "%66", "%67", "%68", "%69")
MULTIPLY_VALUES(__nv_bfloat16, "bf16", 256, "%128", "%129", "%130", "%131", "%132", "%133")
MULTIPLY_VALUES(__half, "f16", 32, "%16", "%17", "%18", "%19", "%20", "%21")
MULTIPLY_VALUES(__half, "f16", 64, "%32", "%33", "%34", "%35", "%36", "%37")
MULTIPLY_VALUES(__half, "f16", 128, "%64", "%65", "%66", "%67", "%68", "%69")
MULTIPLY_VALUES(__half, "f16", 256, "%128", "%129", "%130", "%131", "%132", "%133")

// --- A ring of tiles ---

// Weights and activations have stages of their own: a tile of 128 codes goes with two of 64 values.
template <uint32_t FEATURES, uint32_t TOKENS, uint32_t WEIGHT_STAGES, uint32_t X_STAGES>
struct Ring {
    alignas(1024) uint8_t weight[WEIGHT_STAGES][FEATURES][DEPTH];
    alignas(1024) uint8_t x[X_STAGES][TOKENS][HALF_BYTES];
};

template <uint32_t STAGES>
struct Barriers {
    uint64_t full[STAGES], empty[STAGES];

    __device__ __forceinline__ void init(uint32_t releases) {
        for (uint32_t i = 0; i < STAGES; i++) {
            barrier_init(shared_address(&full[i]), 1);
            barrier_init(shared_address(&empty[i]), releases);
        }
    }
};

// Where somebody is in a ring of so many stages.
template <uint32_t STAGES>
struct Place {
    uint32_t stage = 0, phase = 0;

    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
    __device__ __forceinline__ uint32_t previous() const { return (stage == 0 ? STAGES : stage) - 1; }
};

// Copies the tiles of FEATURES rows of the weight from `row` on, for steps `begin` to `end` along K.
template <uint32_t FEATURES, uint32_t STAGES>
__device__ __forceinline__ void copy_weights(uint8_t (&tiles)[STAGES][FEATURES][DEPTH], Barriers<STAGES>& barriers,
                                             Place<STAGES>& at, const ScaledMm& args, const CUtensorMap& weight,
                                             uint32_t row, uint32_t begin, uint32_t end) {
    for (uint32_t step = begin; step < end; step++) {
        const uint32_t full = shared_address(&barriers.full[at.stage]);
        barrier_wait(shared_address(&barriers.empty[at.stage]), at.phase ^ 1);
        barrier_expect(full, FEATURES * DEPTH);
        copy_weight_tile(args, shared_address(tiles[at.stage]), &weight, step * DEPTH, row, full);
        at.advance();
    }
}

// The same of TOKENS rows of activations, which SHARERS blocks of a cluster have in common: each copies its part, of
// rank `rank`, into the memory of all.
template <uint32_t SHARERS, uint32_t TOKENS, uint32_t STAGES>
__device__ __forceinline__ void copy_x(uint8_t (&tiles)[STAGES][TOKENS][HALF_BYTES], Barriers<STAGES>& barriers,
                                       Place<STAGES>& at, const CUtensorMap& x, uint32_t row, uint32_t begin,
                                       uint32_t end, uint32_t rank) {
    constexpr uint32_t PART = TOKENS / SHARERS;
    for (uint32_t half = begin * 2; half < end * 2; half++) {
        const uint32_t full = shared_address(&barriers.full[at.stage]);
        barrier_wait(shared_address(&barriers.empty[at.stage]), at.phase ^ 1);
        barrier_expect(full, TOKENS * HALF_BYTES);
        if constexpr (SHARERS == 1) {
            copy_tile(shared_address(tiles[at.stage]), &x, half * HALF_BYTES, row, full);
        } else {
            copy_tile_to(shared_address(tiles[at.stage][rank * PART]), &x, half * HALF_BYTES, row + rank * PART, full,
                         (1 << SHARERS) - 1);
        }
        at.advance();
    }
}

template <uint32_t COUNT>
__device__ __forceinline__ void hold(uint32_t (&words)[COUNT][4]) {
#pragma unroll
    for (uint32_t i = 0; i < COUNT * 4; i++) asm volatile("" : "+r"(words[i / 4][i % 4])::"memory");
}

// By a warpgroup, for its 64 rows of the ring's weights and all tokens: the sums over `steps` tiles along K. Lanes hold
// them as `multiply` says. If BLOCK, the sum of each step is multiplied with `scale(step)` before it is added.
//
// Weights are widened, and multiplied, two instructions at a time: the next ones are widened while the tensor cores work
// on those before. Where they have to be waited for, they work for the block's other warpgroups.
template <typename T, uint32_t SHARERS, bool BLOCK, uint32_t FEATURES, uint32_t TOKENS, uint32_t WEIGHT_STAGES,
          uint32_t X_STAGES, uint32_t SUMS, typename F>
__device__ __forceinline__ void multiply_tiles(Ring<FEATURES, TOKENS, WEIGHT_STAGES, X_STAGES>& ring,
                                               Barriers<WEIGHT_STAGES>& weights, Barriers<X_STAGES>& xs,
                                               Place<WEIGHT_STAGES>& weight_at, Place<X_STAGES>& x_at, uint32_t group,
                                               uint32_t steps, float (&total)[SUMS], F scale) {
    static_assert(SUMS == TOKENS / 2);
    constexpr uint32_t AT_ONCE = 2, PIECES = 8 / AT_ONCE, OF_HALF = 4 / AT_ONCE; // of a step, of a tile of activations
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, g = lane / 4, t = lane % 4;
    // A lane's first codes. Rows' parts of 16 codes change places by the row, as the copy engine's swizzle of 128 bytes
    // has it.
    const uint32_t first = (group * GROUP_FEATURES + warp * 16 + g) * DEPTH + g * 16 + t * 2;
    uint32_t codes[AT_ONCE][4], a[2][AT_ONCE][4];
    auto load_piece = [&](uint32_t piece) {
        const uint32_t row = shared_address(ring.weight[weight_at.stage]) + first;
#pragma unroll
        for (uint32_t k = 0; k < AT_ONCE; k++) {
            const uint32_t at = row ^ (piece * AT_ONCE + k) * 16;
            codes[k][0] = load_codes<0>(at);
            codes[k][1] = load_codes<8 * DEPTH>(at);
            codes[k][2] = load_codes<8>(at);
            codes[k][3] = load_codes<8 * DEPTH + 8>(at);
        }
    };
    auto widen_piece = [&](uint32_t piece) {
#pragma unroll
        for (uint32_t i = 0; i < AT_ONCE * 4; i++) a[piece % 2][i / 4][i % 4] = widen2<T>(codes[i / 4][i % 4]);
    };
    // Of the activations before the place.
    auto release_x = [&] {
        const uint32_t empty = shared_address(&xs.empty[x_at.previous()]);
        if constexpr (SHARERS == 1) {
            if (lane == 0) barrier_arrive(empty);
        } else {
            if (lane < SHARERS) barrier_arrive_at(empty, lane);
        }
    };
    auto wait_for_weights = [&] { barrier_wait(shared_address(&weights.full[weight_at.stage]), weight_at.phase); };
    auto release_weights = [&] {
        __syncwarp();
        if (lane == 0) barrier_arrive(shared_address(&weights.empty[weight_at.stage]));
        weight_at.advance();
    };
    float part[BLOCK ? SUMS : 1];
    if constexpr (BLOCK) {
#pragma unroll
        for (uint32_t i = 0; i < SUMS; i++) total[i] = 0.0f;
    }

    wait_for_weights();
    load_piece(0);
    widen_piece(0);
    for (uint32_t step = 0; step < steps; step++) {
#pragma unroll
        for (uint32_t piece = 0; piece < PIECES; piece++) {
            const uint32_t within = piece % OF_HALF;
            if (within == 0) barrier_wait(shared_address(&xs.full[x_at.stage]), x_at.phase);
            const uint64_t b = tile_descriptor(shared_address(ring.x[x_at.stage])) + 2 * within * AT_ONCE;
            hold(a[piece % 2]);
            products_fence();
#pragma unroll
            for (uint32_t k = 0; k < AT_ONCE; k++) {
                if constexpr (BLOCK) {
                    multiply_values<T, TOKENS>(part, a[piece % 2][k], b + 2 * k, piece + k > 0);
                } else {
                    multiply_values<T, TOKENS>(total, a[piece % 2][k], b + 2 * k, step + piece + k > 0);
                }
            }
            products_commit();
            const bool more = piece + 1 < PIECES || step + 1 < steps;
            if (more) {
                if (piece + 1 == PIECES) wait_for_weights();
                load_piece((piece + 1) % PIECES);
            }
            // Products of the piece before are done: its registers are free, and so are its activations if it was their
            // last.
            products_wait<1>();
            hold(a[(piece + 1) % 2]);
            if (within == 0 && (piece > 0 || (!BLOCK && step > 0))) release_x();
            if (within == OF_HALF - 1) x_at.advance();
            if (more) widen_piece(piece + 1);
            if (piece + 2 == PIECES) release_weights();
        }
        if constexpr (BLOCK) {
            const float of_step = scale(step);
            products_wait<0>();
            hold(part);
            release_x();
#pragma unroll
            for (uint32_t i = 0; i < SUMS; i++) total[i] = fmaf(part[i], of_step, total[i]);
        }
    }
    if constexpr (!BLOCK) {
        products_wait<0>();
        hold(total);
        release_x();
    }
}
