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

// WIDTH neighbours of either half of a head: PIECE or one.
template <typename T, uint32_t WIDTH>
struct Few {
    Piece<T> piece;

    __device__ __forceinline__ void load(const T* from) { piece.load(from); }
    __device__ __forceinline__ void store(T* to) const { piece.store(to); }
    __device__ __forceinline__ void widen(float (&values)[WIDTH]) const { piece.widen(values); }
    __device__ __forceinline__ void round(const float (&values)[WIDTH]) { piece.round(values); }
};
template <typename T>
struct Few<T, 1> {
    T value;

    __device__ __forceinline__ void load(const T* from) { value = *from; }
    __device__ __forceinline__ void store(T* to) const { *to = value; }
    __device__ __forceinline__ void widen(float (&values)[1]) const { values[0] = to_f32(value); }
    __device__ __forceinline__ void round(const float (&values)[1]) { value = from_f32<T>(values[0]); }
};

// A team of lanes has a head of q, k or v. What it needs a second time, it reads a second time, from the first-level
// cache.
template <typename T, uint32_t WIDTH>
__device__ __forceinline__ void rope_append(const RopeAppend& args) {
    using Values = Few<T, WIDTH>;
    launch_dependents();
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

    // A lane's first angles, and only then what earlier kernels wrote.
    const uint32_t first = lane * WIDTH, step = args.lanes * WIDTH;
    const uint64_t angle = uint64_t(position - args.first_angle) * half;
    const T* const cos_row = static_cast<const T*>(args.cos) + angle;
    const T* const sin_row = static_cast<const T*>(args.sin) + angle;
    Values cos, sin;
    const auto load_angles = [&](uint32_t i) {
        if (there && !is_v && i < half) cos.load(cos_row + i), sin.load(sin_row + i);
    };
    load_angles(first);
    wait_for_inputs();

    float root = 1.0f;
    if (args.q_weight) {
        float squares = 0.0f;
        for (uint32_t i = first; there && i < half; i += step) {
            Values low, high;
            low.load(from + i), high.load(from + half + i);
            float a[WIDTH], b[WIDTH];
            low.widen(a), high.widen(b);
#pragma unroll
            for (uint32_t j = 0; j < WIDTH; j++) squares = __fmaf_rn(a[j], a[j], __fmaf_rn(b[j], b[j], squares));
        }
        for (uint32_t lanes = 1; lanes < args.lanes; lanes *= 2) squares += __shfl_xor_sync(~0u, squares, lanes);
        root = __frcp_rn(__fsqrt_rn(__fadd_rn(__fdiv_rn(squares, float(args.dim)), args.eps)));
    }
    if (!there) return;

    for (uint32_t i = first; i < half; i += step) {
        Values low, high;
        low.load(from + i), high.load(from + half + i);
        float a[WIDTH], b[WIDTH];
        low.widen(a), high.widen(b);
        if (weight) {
            Values weight_low, weight_high;
            weight_low.load(weight + i), weight_high.load(weight + half + i);
            float by_a[WIDTH], by_b[WIDTH];
            weight_low.widen(by_a), weight_high.widen(by_b);
#pragma unroll
            for (uint32_t j = 0; j < WIDTH; j++) {
                a[j] = rounded<T>(__fmul_rn(rounded<T>(__fmul_rn(a[j], root)), by_a[j]));
                b[j] = rounded<T>(__fmul_rn(rounded<T>(__fmul_rn(b[j], root)), by_b[j]));
            }
        }
        if (!is_v) {
            float c[WIDTH], s[WIDTH];
            cos.widen(c), sin.widen(s);
#pragma unroll
            for (uint32_t j = 0; j < WIDTH; j++) {
                // As the CPU: two products and a sum, each rounded to f32.
                const float x = a[j], y = b[j];
                a[j] = __fsub_rn(__fmul_rn(x, c[j]), __fmul_rn(y, s[j]));
                b[j] = __fadd_rn(__fmul_rn(y, c[j]), __fmul_rn(x, s[j]));
            }
            low.round(a), high.round(b);
        }
        low.store(to + i), high.store(to + half + i);
        load_angles(i + step);
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
