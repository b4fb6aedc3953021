// Attention of many queries, on Hopper.
//
// Two warpgroups have 64 rows of a head of keys each; a thread of a third one brings queries, keys and values into
// shared memory. The scores of the next keys and the sums of values with the weights of those before are started
// together; while the latter go on, weights are made of the former. All of it stays in registers, and weights are the
// left factor of the second product where they are. Keys are taken from the last one down, so that the masked ones come
// first. Blocks stay and take tile after tile, those with the most keys first, and every second round in the other
// direction: so all have about as many keys.

#include "attention.cuh"
#include "primitives.cuh"
#include "sm90_values.cuh"
#include "tiles.cuh"

constexpr uint32_t GROUPS = 2, GROUP_ROWS = 64, ROWS = GROUPS * GROUP_ROWS; // host twin: in `sm90.rs`
constexpr uint32_t KEYS = 128;
constexpr uint32_t COLS = 64; // dimensions of a tile: 128 bytes

// --- Warpgroup products of 16-bit values ---

// D[64, 128] = A[64, 16] * B[128, 16]^T, both in shared memory.
template <typename T>
__device__ __forceinline__ void multiply_scores(float (&d)[64], uint64_t a, uint64_t b, bool add);
// D[64, N] += A[64, 16] * B[16, N], A in registers as `multiply_values` says. In shared memory, B's rows run along N.
template <typename T, int N>
__device__ __forceinline__ void add_values(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b);

#define MULTIPLY_SCORES(T, NAME)                                                                                       \
    template <>                                                                                                        \
    __device__ __forceinline__ void multiply_scores<T>(float(&d)[64], uint64_t a, uint64_t b, bool add) {              \
        asm volatile("{ .reg .pred add; setp.ne.b32 add, %66, 0;"                                                      \
                     " wgmma.mma_async.sync.aligned.m64n128k16.f32." NAME "." NAME " {" SUMS_128 "}, %64, %65, add,"   \
                     " 1, 1, 0, 0; }"                                                                                  \
                     : REFS_128(d)                                                                                     \
                     : "l"(a), "l"(b), "r"(int(add)));                                                                 \
    }
#define ADD_VALUES(T, NAME, N, A0, A1, A2, A3, B, ONE)                                                                 \
    template <>                                                                                                        \
    __device__ __forceinline__ void add_values<T, N>(float(&d)[N / 2], const uint32_t(&a)[4], uint64_t b) {            \
        asm volatile("{ .reg .pred add; setp.ne.b32 add, " ONE ", 0;"                                                  \
                     " wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" SUMS_##N "}, "              \
                     "{" A0 ", " A1 ", " A2 ", " A3 "}, " B ", add, 1, 1, 1; }"                                        \
                     : REFS_##N(d)                                                                                     \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(1));                                    \
    }

MULTIPLY_SCORES(__nv_bfloat16, "bf16")
MULTIPLY_SCORES(__half, "f16")
ADD_VALUES(__nv_bfloat16, "bf16", 64, "%32", "%33", "%34", "%35", "%36", "%37")
ADD_VALUES(__nv_bfloat16, "bf16", 128, "%64", "%65", "%66", "%67", "%68", "%69")
ADD_VALUES(__half, "f16", 64, "%32", "%33", "%34", "%35", "%36", "%37")
ADD_VALUES(__half, "f16", 128, "%64", "%65", "%66", "%67", "%68", "%69")

__device__ __forceinline__ uint32_t pack(float low, float high, __half) { return pack2(low, high, F16); }
__device__ __forceinline__ uint32_t pack(float low, float high, __nv_bfloat16) { return pack2(low, high, BF16); }

// Copies a tile of a tensor of four dimensions, from (x, y, z, w) on; what lies outside is zero.
__device__ __forceinline__ void copy_tile(uint32_t to, const CUtensorMap* from, uint32_t x, uint32_t y, uint32_t z,
                                          uint32_t w, uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 " [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(to),
                 "l"(from), "r"(x), "r"(y), "r"(z), "r"(w), "r"(barrier)
                 : "memory");
}

template <uint32_t D>
struct Shared {
    static constexpr uint32_t STAGES = D == 64 ? 4 : 2, PARTS = D / COLS;
    alignas(1024) uint8_t q[PARTS][ROWS][128];
    alignas(1024) uint8_t k[STAGES][PARTS][KEYS][128];
    alignas(1024) uint8_t v[STAGES][PARTS][KEYS][128];
    alignas(16) uint8_t out[GROUPS * 4][16 * D * 2]; // of a warp
    Barriers<1> queries;
    Barriers<STAGES> keys, values;
};

// Rows of a head of keys, and the tiles of keys that they see: from `first` to before `end`.
struct Work {
    uint32_t sequence, head, query, first, end;
};

// Calls with each tile of this block.
template <typename F>
__device__ __forceinline__ void each(const Attention& args, F f) {
    const uint32_t height = ROWS / args.group, tiles = (args.queries + height - 1) / height;
    const uint32_t heads = args.kv_heads * args.batch, total = tiles * heads;
    for (uint32_t round = 0; round * gridDim.x < total; round++) {
        const uint32_t index = round * gridDim.x + (round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
        if (index >= total) continue;
        Work work;
        work.head = index % heads % args.kv_heads, work.sequence = index % heads / args.kv_heads;
        work.query = (tiles - 1 - index / heads) * height;
        const uint32_t last = min(work.query + height, args.queries) - 1;
        work.first = args.begin(args.position, work.query * args.group) / KEYS;
        work.end = (args.end(args.position, last * args.group) + KEYS - 1) / KEYS;
        f(work);
    }
}

template <uint32_t D>
__device__ __forceinline__ void produce(Shared<D>& shared, const Attention& args, const CUtensorMap& q,
                                        const CUtensorMap& k, const CUtensorMap& v) {
    constexpr uint32_t STAGES = Shared<D>::STAGES, PARTS = D / COLS;
    Place<1> q_at;
    Place<STAGES> at;
    const auto copy = [&](uint8_t(&to)[STAGES][PARTS][KEYS][128], Barriers<STAGES>& barriers, const CUtensorMap& from,
                          const Work& work, uint32_t tile) {
        const uint32_t full = shared_address(&barriers.full[at.stage]);
        barrier_wait(shared_address(&barriers.empty[at.stage]), at.phase ^ 1);
        barrier_expect(full, sizeof(to[0]));
        for (uint32_t i = 0; i < PARTS; i++) {
            copy_tile(shared_address(to[at.stage][i]), &from, i * COLS, tile * KEYS, work.head, work.sequence, full);
        }
    };
    each(args, [&](const Work& work) {
        const uint32_t full = shared_address(&shared.queries.full[0]);
        barrier_wait(shared_address(&shared.queries.empty[0]), q_at.phase ^ 1);
        barrier_expect(full, ROWS / args.group * args.group * D * 2);
        for (uint32_t i = 0; i < PARTS; i++) {
            copy_tile(shared_address(shared.q[i]), &q, i * COLS, work.head * args.group, work.query, work.sequence,
                      full);
        }
        q_at.advance();
        for (uint32_t tile = work.end; tile-- > work.first;) {
            copy(shared.k, shared.keys, k, work, tile);
            copy(shared.v, shared.values, v, work, tile);
            at.advance();
        }
    });
}

// Makes weights of scores, of rows g and g + 8 of a warp. `factor` is what earlier sums are to be multiplied with.
__device__ __forceinline__ void weigh(float (&scores)[KEYS / 2], float (&most)[2], float (&sum)[2], float (&factor)[2],
                                      float scale) {
#pragma unroll
    for (uint32_t h = 0; h < 2; h++) {
        float largest = most[h];
#pragma unroll
        for (uint32_t i = 2 * h; i < KEYS / 2; i += 4) largest = fmaxf(largest, fmaxf(scores[i], scores[i + 1]));
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
        const float below = reference(largest) * scale;
        factor[h] = exp2_fast(__fmaf_rn(most[h], scale, -below));
        most[h] = largest;
        float sums[2] = {};
#pragma unroll
        for (uint32_t i = 2 * h; i < KEYS / 2; i += 4) {
#pragma unroll
            for (uint32_t c = 0; c < 2; c++) {
                scores[i + c] = exp2_fast(__fmaf_rn(scores[i + c], scale, -below));
                sums[c] += scores[i + c];
            }
        }
        sum[h] = __fmaf_rn(sum[h], factor[h], sums[0] + sums[1]);
    }
}

template <typename T, uint32_t D>
__device__ __forceinline__ void consume(Shared<D>& shared, const Attention& args) {
    using Layout = Tile<D * 2, 8>;
    constexpr uint32_t STAGES = Shared<D>::STAGES;
    // Warpgroups take turns at the tensor cores, and make weights while the other one multiplies. Heads of 64 have too
    // few products for that.
    constexpr bool TURNS = D == 128;
    // The same in all lanes, as the compiler sees by this, so that addresses of tiles are computed once a warp.
    const uint32_t group = __shfl_sync(~0u, threadIdx.x / WARPGROUP - 1, 0);
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, g = lane / 4, t = lane % 4;
    uint8_t* const results = shared.out[group * 4 + warp];
    Place<1> q_at;
    Place<STAGES> k_at, v_at;

    float scores[KEYS / 2], out[D / 2];
    uint32_t weights[KEYS / 16][4];
    const auto release = [&](uint64_t& empty) {
        if (lane == 0) barrier_arrive(shared_address(&empty));
    };
    const auto start_scores = [&] {
        barrier_wait(shared_address(&shared.keys.full[k_at.stage]), k_at.phase);
        hold(scores);
        products_fence();
#pragma unroll
        for (uint32_t d = 0; d < D / 16; d++) {
            const uint64_t a = tile_descriptor(shared_address(shared.q[d / 4][group * GROUP_ROWS])) + d % 4 * 2;
            const uint64_t b = tile_descriptor(shared_address(shared.k[k_at.stage][d / 4])) + d % 4 * 2;
            multiply_scores<T>(scores, a, b, d > 0);
        }
        products_commit();
    };
    const auto start_sums = [&] {
        barrier_wait(shared_address(&shared.values.full[v_at.stage]), v_at.phase);
        hold(out);
        hold(weights);
        products_fence();
        // Rows of values run along the dimensions: the next 64 of them are a tile further, the next 8 keys 1024 bytes.
        const uint64_t next_part = uint64_t(KEYS * 128 / 16 - 1) << 16;
        const uint64_t b = tile_descriptor(shared_address(shared.v[v_at.stage])) + next_part;
#pragma unroll
        for (uint32_t i = 0; i < KEYS / 16; i++) add_values<T, D>(out, weights[i], b + i * (16 * 128 / 16));
        products_commit();
    };

    if (TURNS && group == 1) named_barrier_arrive(1, GROUPS * WARPGROUP);
    each(args, [&](const Work& work) {
        const uint32_t first_row = work.query * args.group + group * GROUP_ROWS, row = first_row + warp * 16 + g;
        // All keys from here to there are seen by all rows of the warpgroup.
        const uint32_t all_from = args.begin(args.position, first_row + GROUP_ROWS - 1);
        const uint32_t all_to = args.end(args.position, first_row);
        const uint32_t to[2] = {args.end(args.position, row), args.end(args.position, row + 8)};
        float most[2] = {-INFINITY, -INFINITY}, sum[2] = {}, factor[2];
        const auto finish_scores = [&](uint32_t tile) {
            release(shared.keys.empty[k_at.stage]);
            k_at.advance();
            if (tile == work.first) release(shared.queries.empty[0]);
            const uint32_t first = tile * KEYS;
            if (first < all_from || first + KEYS > all_to) {
#pragma unroll
                for (uint32_t i = 0; i < KEYS / 2; i++) {
                    const uint32_t key = first + i / 4 * 8 + 2 * t + i % 2, end = to[i / 2 % 2];
                    if (key >= end || end - key > args.window) scores[i] = -INFINITY;
                }
            }
            weigh(scores, most, sum, factor, args.scale);
        };
        const auto pack_weights = [&] {
#pragma unroll
            for (uint32_t i = 0; i < KEYS / 4; i++) {
                weights[i / 4][i % 4] = pack(scores[2 * i], scores[2 * i + 1], T());
            }
        };

        barrier_wait(shared_address(&shared.queries.full[0]), q_at.phase);
        q_at.advance();
        start_scores();
        products_wait<0>();
        hold(scores);
        finish_scores(work.end - 1);
        pack_weights();
#pragma unroll
        for (uint32_t i = 0; i < D / 2; i++) out[i] = 0.0f;
        for (uint32_t tile = work.end - 1; tile-- > work.first;) {
            if (TURNS) named_barrier(1 + group, GROUPS * WARPGROUP);
            start_scores();
            start_sums();
            if (TURNS) named_barrier_arrive(1 + (group ^ 1), GROUPS * WARPGROUP);
            products_wait<1>();
            hold(scores);
            finish_scores(tile);
            // The compiler would wait for the values' products before the weights, if this did not need them.
            bool rescale = true;
            if (TURNS) {
                rescale = __any_sync(~0u, factor[0] != 1.0f || factor[1] != 1.0f || sum[0] + sum[1] < 0.0f);
                if (rescale) products_wait<0>();
            }
            products_wait<0>();
            hold(out);
            hold(weights);
            release(shared.values.empty[v_at.stage]);
            v_at.advance();
            if (rescale) {
#pragma unroll
                for (uint32_t i = 0; i < D / 2; i++) out[i] *= factor[i / 2 % 2];
            }
            pack_weights();
        }
        start_sums();
        products_wait<0>();
        hold(out);
        release(shared.values.empty[v_at.stage]);
        v_at.advance();

        // Through shared memory, so that rows are written in pieces of 16 bytes.
        float by[2];
#pragma unroll
        for (uint32_t h = 0; h < 2; h++) {
            sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
            sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
            by[h] = reciprocal_fast(sum[h]);
        }
        __syncwarp();
#pragma unroll
        for (uint32_t i = 0; i < D / 16; i++) {
            uint32_t words[4];
#pragma unroll
            for (uint32_t w = 0; w < 4; w++) {
                words[w] = pack(out[8 * i + 2 * w] * by[w % 2], out[8 * i + 2 * w + 1] * by[w % 2], T());
            }
            store_matrices(results + Layout::place(lane % 16, 2 * i + lane / 16), words);
        }
        __syncwarp();
        const uint32_t rows = min(ROWS / args.group, args.queries - work.query) * args.group;
        const uint32_t warp_row = group * GROUP_ROWS + warp * 16, tile_row = work.query * args.group;
#pragma unroll 4
        for (uint32_t i = lane; i < 16 * Layout::PIECES; i += 32) {
            const uint32_t own = i / Layout::PIECES, piece = i % Layout::PIECES;
            if (warp_row + own >= rows) break;
            const uint64_t at = args.at(work.sequence, work.head, tile_row + warp_row + own, args.out_stride);
            *reinterpret_cast<uint4*>(static_cast<T*>(args.out) + at + piece * 8) =
                *reinterpret_cast<const uint4*>(results + Layout::place(own, piece));
        }
    });
}

template <typename T, uint32_t D>
__device__ __forceinline__ void attention(const Attention& args, const CUtensorMap& q, const CUtensorMap& k,
                                          const CUtensorMap& v) {
    static_assert(sizeof(Shared<D>) + 1024 <= 227 * 1024);
    auto& shared = aligned_shared<Shared<D>>();
    if (threadIdx.x == 0) {
        prefetch_map(&q), prefetch_map(&k), prefetch_map(&v);
        // Warps release.
        shared.queries.init(GROUPS * 4), shared.keys.init(GROUPS * 4), shared.values.init(GROUPS * 4);
        barrier_init_fence();
    }
    __syncthreads();
    launch_dependents();
    wait_for_inputs();
    if (threadIdx.x < WARPGROUP) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(24));
        if (threadIdx.x == 0) produce(shared, args, q, k, v);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(240));
        consume<T>(shared, args);
    }
}

#define ATTENTION(NAME, T, D)                                                                                          \
    extern "C" __global__ void __launch_bounds__((GROUPS + 1) * WARPGROUP, 1)                                          \
        attention_sm90_##NAME##_##D(const __grid_constant__ Attention args, const __grid_constant__ CUtensorMap q,     \
                                    const __grid_constant__ CUtensorMap k, const __grid_constant__ CUtensorMap v) {    \
        attention<T, D>(args, q, k, v);                                                                                \
    }

ATTENTION(bf16, __nv_bfloat16, 64)
ATTENTION(bf16, __nv_bfloat16, 128)
ATTENTION(f16, __half, 64)
ATTENTION(f16, __half, 128)
