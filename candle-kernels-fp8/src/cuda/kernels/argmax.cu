// Where the largest value of each row is, and what the next token needs of it.
//
// Blocks share a row; the last of them to finish compares what all found.

#include "primitives.cuh"
#include "rows.cuh"

constexpr uint32_t THREADS = 256, WARPS = THREADS / 32;
constexpr uint32_t MOST_PARTS = 64; // host twin in `argmax.rs`

// What the blocks of a row leave for the last one. Host twin: `SCRATCH_ROW` in `argmax.rs`.
struct Scratch {
    uint32_t finished; // blocks; 0 again after the last one
    uint32_t unused[3];
    uint2 found[MOST_PARTS]; // key and index
};

// Host twin: `Params` in `argmax.rs`.
struct Argmax {
    const void* logits;   // [rows, len]
    uint32_t* ids;        // [rows]
    uint32_t* next;       // null or [rows]
    uint32_t* positions;  // null or [rows]
    uint32_t* not_finite; // null or one word
    Scratch* scratch;     // [rows]
    uint64_t stride;     // elements from row to row
    uint32_t len;
    uint32_t parts;   // blocks that share a row
    uint32_t each;    // elements of each of them, whole pieces
    uint32_t aligned; // whether rows start at multiples of 16 bytes
};

// A value as an integer in the same order, the two zeros as one. Not for NaN: that of -INFINITY is above 0, and that of
// INFINITY below the largest integer.
__device__ __forceinline__ uint32_t key_of(float value) {
    const uint32_t bits = __float_as_uint(__fadd_rn(value, 0.0f));
    return bits ^ (bits >> 31 ? ~0u : 1u << 31);
}

// The largest key of a warp, and the first of its indices.
__device__ __forceinline__ void reduce(uint32_t& key, uint32_t& index) {
    const uint32_t most = __reduce_max_sync(~0u, key);
    index = __reduce_min_sync(~0u, key == most ? index : ~0u);
    key = most;
}

template <typename T>
__device__ __forceinline__ void argmax(const Argmax& args) {
    constexpr uint32_t DEPTH = 2; // pieces that a thread has under way
    __shared__ uint2 of_warps[WARPS];
    launch_dependents();
    wait_for_inputs();
    const uint32_t row = blockIdx.x / args.parts, part = blockIdx.x % args.parts;
    const T* const logits = static_cast<const T*>(args.logits) + row * args.stride;
    const uint32_t begin = part * args.each, end = min(begin + args.each, args.len);

    // As folding from the first one on with `x < y`: NaN is passed over, and -INFINITY never larger.
    float most = -INFINITY;
    uint32_t index = 0;
    bool finite = true;
    const auto offer = [&](float value, uint32_t at) {
        if (value > most) most = value, index = at;
        finite &= fabsf(value) < INFINITY;
    };
    const uint32_t pieces_end = args.aligned ? begin + (end - begin) / PIECE * PIECE : begin;
    for (uint32_t base = begin + threadIdx.x * PIECE; base < pieces_end; base += DEPTH * THREADS * PIECE) {
        Piece<T> held[DEPTH];
#pragma unroll
        for (uint32_t i = 0; i < DEPTH; i++) {
            const uint32_t at = base + i * THREADS * PIECE;
            if (at < pieces_end) held[i].load(logits + at);
        }
#pragma unroll
        for (uint32_t i = 0; i < DEPTH; i++) {
            const uint32_t at = base + i * THREADS * PIECE;
            if (at >= pieces_end) continue;
            float values[PIECE];
            held[i].widen(values);
#pragma unroll
            for (uint32_t j = 0; j < PIECE; j++) offer(values[j], at + j);
        }
    }
    for (uint32_t at = pieces_end + threadIdx.x; at < end; at += THREADS) offer(to_f32(logits[at]), at);
    if (!finite && args.not_finite) *args.not_finite = 1;

    uint32_t key = key_of(most);
    // Nothing is larger than a NaN to begin with.
    if (part == 0 && threadIdx.x == 0 && isnan(to_f32(logits[0]))) key = ~0u, index = 0;
    reduce(key, index);
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = make_uint2(key, index);
    __syncthreads();
    if (threadIdx.x >= 32) return;
    const uint2 of_warp = threadIdx.x < WARPS ? of_warps[threadIdx.x] : make_uint2(0, 0);
    key = of_warp.x, index = of_warp.y;
    reduce(key, index);

    if (args.parts > 1) {
        Scratch& scratch = args.scratch[row];
        uint32_t before = 0;
        if (threadIdx.x == 0) {
            scratch.found[part] = make_uint2(key, index);
            before = count(&scratch.finished, args.parts - 1);
        }
        if (__shfl_sync(~0u, before, 0) != args.parts - 1) return;
        __syncwarp();
        key = index = 0;
        for (uint32_t i = threadIdx.x; i < args.parts; i += 32) {
            const uint2 found = __ldcg(&scratch.found[i]);
            // Parts are in the order of their indices.
            if (found.x > key) key = found.x, index = found.y;
        }
        reduce(key, index);
    }
    if (threadIdx.x > 0) return;
    args.ids[row] = index;
    if (args.next) args.next[row] = index;
    if (args.positions) args.positions[row]++;
}

#define ARGMAX(NAME, T)                                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS) argmax_##NAME(Argmax args) { argmax<T>(args); }

ARGMAX(bf16, __nv_bfloat16)
ARGMAX(f16, __half)
ARGMAX(f32, float)
