// Rotary position embedding of queries and keys, with the norm of their heads before, and keys and values written to a
// cache.

#include "rows.cuh"

// Host twin: `Params` in `rope_append.rs`.
struct RopeAppend {
    const void* q; // [B, L, Hq, D]
    const void* k; // [B, L, Hkv, D]
    const void* v; // [B, L, Hkv, D]
    const void* cos;           // [.., D / 2]
    const void* sin;           // [.., D / 2]
    const void* q_weight;      // null or [D]
    const void* k_weight;      // null or [D]
    const uint32_t* positions; // null or [B]: of a sequence's first token
    void* q_out;               // [B, L, Hq, D]
    void* keys;                // [B, Hkv, T, D]
    void* values;              // [B, Hkv, T, D]
    uint64_t q_stride, k_stride, v_stride, q_out_stride; // elements from token to token
    uint64_t k_batch, k_head, v_batch, v_head;           // elements from sequence to sequence, and from head to head
    uint32_t position;                                   // of the first token, without `positions`
    uint32_t capacity;                                   // positions that a head has room for, at least L
    uint32_t first_angle;                                // position of the first row of `cos` and `sin`
    uint32_t batch, len, heads, kv_heads, dim;           // B; L; Hq; Hkv; D
    uint32_t lanes;                                      // that share a head: a power of two up to 32
    float eps;
};

// WIDTH neighbours of either half of a head.
template <typename T, uint32_t WIDTH>
struct Few {
    float values[WIDTH];

    __device__ __forceinline__ void load(const T* from) {
        if constexpr (WIDTH == PIECE) {
            Piece<T> piece;
            piece.load(from);
            piece.widen(values);
        } else {
            values[0] = to_f32(*from);
        }
    }
    __device__ __forceinline__ void store(T* to) const {
        if constexpr (WIDTH == PIECE) {
            Piece<T> piece;
            piece.round(values);
            piece.store(to);
        } else {
            *to = from_f32<T>(values[0]);
        }
    }
};

// A team of lanes has a head of q, k or v. What it needs a second time, it reads a second time, from the first-level cache.
template <typename T, uint32_t WIDTH>
__device__ __forceinline__ void rope_append(const RopeAppend& args) {
    using Values = Few<T, WIDTH>;
    launch_dependents();
    wait_for_inputs();
    const uint32_t lane = threadIdx.x & (args.lanes - 1);
    const uint32_t team = (blockIdx.x * blockDim.x + threadIdx.x) / args.lanes;
    const uint32_t all_heads = args.heads + 2 * args.kv_heads, half = args.dim / 2;
    const uint32_t token = team / all_heads, sequence = token / args.len, at = token % args.len;
    // Whole warps go on, as lanes exchange sums.
    const bool there = sequence < args.batch;
    const uint32_t position = (args.positions && there ? min(args.positions[sequence], args.capacity - args.len)
                                                       : args.position) + at;

    uint32_t head = team % all_heads;
    const bool is_q = head < args.heads, is_v = head >= args.heads + args.kv_heads;
    const T *from, *weight;
    T* to;
    if (is_q) {
        from = static_cast<const T*>(args.q) + token * args.q_stride + head * args.dim;
        to = static_cast<T*>(args.q_out) + token * args.q_out_stride + head * args.dim;
        weight = static_cast<const T*>(args.q_weight);
    } else {
        head = (head - args.heads) % args.kv_heads;
        const void* const source = is_v ? args.v : args.k;
        from = static_cast<const T*>(source) + token * (is_v ? args.v_stride : args.k_stride) + head * args.dim;
        to = static_cast<T*>(is_v ? args.values : args.keys) + sequence * (is_v ? args.v_batch : args.k_batch) +
             head * (is_v ? args.v_head : args.k_head) + uint64_t(position) * args.dim;
        weight = is_v ? nullptr : static_cast<const T*>(args.k_weight);
    }

    float root = 1.0f;
    if (args.q_weight) {
        float squares = 0.0f;
        for (uint32_t i = lane * WIDTH; there && i < half; i += args.lanes * WIDTH) {
            Values low, high;
            low.load(from + i), high.load(from + half + i);
#pragma unroll
            for (uint32_t j = 0; j < WIDTH; j++) {
                squares = __fmaf_rn(low.values[j], low.values[j], squares);
                squares = __fmaf_rn(high.values[j], high.values[j], squares);
            }
        }
        for (uint32_t lanes = 1; lanes < args.lanes; lanes *= 2) squares += __shfl_xor_sync(~0u, squares, lanes);
        root = __frcp_rn(__fsqrt_rn(__fadd_rn(__fdiv_rn(squares, float(args.dim)), args.eps)));
    }
    if (!there) return;

    const uint64_t angle = uint64_t(position - args.first_angle) * half;
    const T* const cos_row = static_cast<const T*>(args.cos) + angle;
    const T* const sin_row = static_cast<const T*>(args.sin) + angle;
    for (uint32_t i = lane * WIDTH; i < half; i += args.lanes * WIDTH) {
        Values low, high;
        low.load(from + i), high.load(from + half + i);
        if (weight) {
            Values by_low, by_high;
            by_low.load(weight + i), by_high.load(weight + half + i);
#pragma unroll
            for (uint32_t j = 0; j < WIDTH; j++) {
                low.values[j] = rounded<T>(__fmul_rn(rounded<T>(__fmul_rn(low.values[j], root)), by_low.values[j]));
                high.values[j] = rounded<T>(__fmul_rn(rounded<T>(__fmul_rn(high.values[j], root)), by_high.values[j]));
            }
        }
        if (!is_v) {
            Values cos, sin;
            cos.load(cos_row + i), sin.load(sin_row + i);
#pragma unroll
            for (uint32_t j = 0; j < WIDTH; j++) {
                // As the CPU: two products and a sum, each rounded to f32.
                const float a = low.values[j], b = high.values[j], c = cos.values[j], s = sin.values[j];
                low.values[j] = __fsub_rn(__fmul_rn(a, c), __fmul_rn(b, s));
                high.values[j] = __fadd_rn(__fmul_rn(b, c), __fmul_rn(a, s));
            }
        }
        low.store(to + i), high.store(to + half + i);
    }
}

#define ROPE_APPEND(NAME, T)                                                                                           \
    extern "C" __global__ void __launch_bounds__(256) rope_append_##NAME##_8(RopeAppend args) {                        \
        rope_append<T, PIECE>(args);                                                                                   \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256) rope_append_##NAME##_1(RopeAppend args) {                        \
        rope_append<T, 1>(args);                                                                                       \
    }

ROPE_APPEND(bf16, __nv_bfloat16)
ROPE_APPEND(f16, __half)
ROPE_APPEND(f32, float)
