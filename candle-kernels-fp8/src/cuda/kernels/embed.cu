// Rows of a table, by ids that are in device memory.

#include "rows.cuh"

// Host twin: `Params` in `embed.rs`.
struct Embed {
    const void* table;   // [vocab, dim]
    const uint32_t* ids; // [n]
    void* out;           // [n, dim], of out_float
    uint32_t* unknown;   // null or one word
    uint32_t vocab, dim;
    uint32_t blocks;  // that share a row
    uint32_t aligned; // whether rows start at multiples of 16 bytes, and are of whole pieces
    Float out_float;
};

constexpr uint32_t THREADS = 256;

// A thread has PIECE elements of a row.
template <typename T>
__device__ __forceinline__ void embed(const Embed& args) {
    launch_dependents();
    wait_for_inputs();
    const uint32_t row = blockIdx.x / args.blocks, first = blockIdx.x % args.blocks * (THREADS * PIECE);
    const uint32_t id = args.ids[row];
    const bool known = id < args.vocab;
    if (!known && args.unknown && first == 0 && threadIdx.x == 0) *args.unknown = 1;
    const T* const from = static_cast<const T*>(args.table) + uint64_t(known ? id : 0) * args.dim;
    with_type(args.out, args.out_float, [&](auto* out) {
        using To = std::remove_pointer_t<decltype(out)>;
        To* const to = out + uint64_t(row) * args.dim;
        if (args.aligned) {
            const uint32_t at = first + threadIdx.x * PIECE;
            if (at >= args.dim) return;
            float values[PIECE];
            Piece<T> read;
            read.load(from + at);
            read.widen(values);
#pragma unroll
            for (uint32_t i = 0; i < PIECE; i++) values[i] = known ? values[i] : NAN;
            Piece<To> written;
            written.round(values);
            written.store(to + at);
            return;
        }
        const uint32_t end = min(first + THREADS * PIECE, args.dim);
#pragma unroll 1
        for (uint32_t at = first + threadIdx.x; at < end; at += THREADS) {
            to[at] = from_f32<To>(known ? to_f32(from[at]) : NAN);
        }
    });
}

#define EMBED(NAME, T)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS) embed_##NAME(Embed args) { embed<T>(args); }

EMBED(bf16, __nv_bfloat16)
EMBED(f16, __half)
EMBED(f32, float)
