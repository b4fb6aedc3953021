// Rows of activations and where they go: as values, or quantized to E4M3.
#pragma once

#include <type_traits>

#include "team.cuh"

enum Mode : uint32_t {
    VALUES = 0,
    TOKEN = 1,  // a scale for each row
    GROUP = 2,  // a scale for each `group` neighbours
    STATIC = 3, // a scale that is given
    TENSOR = 4, // a scale for all rows, computed before
};

// Host twin: `Params` in `rows.rs`.
struct Output {
    void* to;        // [m, k], values or codes
    float* scales;   // TOKEN: [m]; GROUP: [m, ceil(k / group)]
    uint64_t stride; // from row to row: elements of values, bytes of codes, of which those past k become zero
    uint32_t m, k;
    Shape shape;
    uint32_t group;
    Mode mode;
    float scale; // STATIC, TENSOR
};

// Eight neighbours of a row, which start at a multiple of 16 bytes.
constexpr uint32_t PIECE = 8;

template <typename T>
constexpr Float FLOAT = std::is_same_v<T, __half> ? F16 : BF16;

template <typename T>
__device__ __forceinline__ void widen2(uint32_t pair, float& low, float& high) {
    if constexpr (std::is_same_v<T, __half>) {
        const float2 values = __half22float2(*reinterpret_cast<const __half2*>(&pair));
        low = values.x, high = values.y;
    } else {
        low = __uint_as_float(pair << 16), high = __uint_as_float(pair & 0xffff0000);
    }
}

template <typename T>
struct Piece {
    uint4 words;

    __device__ __forceinline__ void clear() { words = make_uint4(0, 0, 0, 0); }
    __device__ __forceinline__ void load(const T* from) { words = *reinterpret_cast<const uint4*>(from); }
    __device__ __forceinline__ void load_as_constant(const T* from) { words = load_constant(from); }
    __device__ __forceinline__ void store(T* to) const { *reinterpret_cast<uint4*>(to) = words; }
    __device__ __forceinline__ void widen(float (&values)[PIECE]) const {
        widen2<T>(words.x, values[0], values[1]);
        widen2<T>(words.y, values[2], values[3]);
        widen2<T>(words.z, values[4], values[5]);
        widen2<T>(words.w, values[6], values[7]);
    }
    __device__ __forceinline__ void round(const float (&values)[PIECE]) {
        words = make_uint4(pack2(values[0], values[1], FLOAT<T>), pack2(values[2], values[3], FLOAT<T>),
                           pack2(values[4], values[5], FLOAT<T>), pack2(values[6], values[7], FLOAT<T>));
    }
};

template <>
struct Piece<float> {
    float4 low, high;

    __device__ __forceinline__ void clear() { low = high = make_float4(0.0f, 0.0f, 0.0f, 0.0f); }
    __device__ __forceinline__ void load(const float* from) {
        low = *reinterpret_cast<const float4*>(from);
        high = *reinterpret_cast<const float4*>(from + 4);
    }
    __device__ __forceinline__ void load_as_constant(const float* from) {
        const uint4 words[2] = {load_constant(from), load_constant(from + 4)};
        low = *reinterpret_cast<const float4*>(&words[0]), high = *reinterpret_cast<const float4*>(&words[1]);
    }
    __device__ __forceinline__ void store(float* to) const {
        *reinterpret_cast<float4*>(to) = low;
        *reinterpret_cast<float4*>(to + 4) = high;
    }
    __device__ __forceinline__ void widen(float (&values)[PIECE]) const {
        values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
        values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
    }
    __device__ __forceinline__ void round(const float (&values)[PIECE]) {
        low = make_float4(values[0], values[1], values[2], values[3]);
        high = make_float4(values[4], values[5], values[6], values[7]);
    }
};

// A value as an element type holds it.
template <typename T>
__device__ __forceinline__ float rounded(float value) { return to_f32(from_f32<T>(value)); }

// The values of eight codes.
__device__ __forceinline__ void decode8(uint2 codes, float (&values)[PIECE]) {
#pragma unroll
    for (uint32_t i = 0; i < PIECE / 2; i++) {
        const float2 pair = __half22float2(decode2((i < 2 ? codes.x : codes.y) >> i % 2 * 16));
        values[2 * i] = pair.x, values[2 * i + 1] = pair.y;
    }
}

// The largest magnitude of eight values or `most`; NaN if one of them is.
__device__ __forceinline__ float amax8(const float (&values)[PIECE], float most) {
#pragma unroll
    for (uint32_t i = 0; i < PIECE; i++) most = max_magnitude(most, values[i]);
    return most;
}

// The scale for values up to `amax`: amax / 448, 1/448 for zeros, and never subnormal. NaN stays NaN.
__device__ __forceinline__ float scale_of(float amax) {
    const float scale = __fdiv_rn(amax == 0.0f ? 1.0f : amax, 448.0f);
    return scale < 1.17549435e-38f ? 1.17549435e-38f : scale;
}

// Divides by a positive scale so that the code of the quotient is that of the correctly rounded one.
//
// With r = rn(1 / s), q0 = rn(x r), e = rn(q0 s - x) and q = rn(q0 - e r), q is rn(x / s) unless something under- or
// overflows: the division by a known divisor with one product and two fused ones of Brisebarre, Muller and Raina
// ("Accelerating correctly rounded floating-point division when the divisor is known in advance", 2004).
// - Scales between 2^-90 and 2^100 are left as they are, others are brought there together with x, by a power of two.
//   If a small x loses bits by that, the quotient is far below 2^-10 before and after, where every code is a zero.
// - For quotients from 2^-11 on, e is a multiple of 2^-35 2^-113 = 2^-148, so it does not underflow. Below, e is off by
//   2^-150 at most and q by 2^-60: the code is a zero as it should be. Its sign is right too: |e| is 0 or far below |x|
//   where q0 is normal, and moves q0 by less than a step where it is not. An exact quotient, or a zero, has e = +0,
//   which changes neither q0 nor the sign of its zero.
// - Where x is not bounded by 448 s, it is first clamped to 512 s, which has the same code and does not overflow.
// - An infinite scale comes from an infinite x. Dividing by it is a product with 0: NaN for infinities, else a zero.
struct Divisor {
    float before, by, inverse;
    bool prepare;

    __device__ __forceinline__ Divisor(float scale, bool bounded) {
        before = scale < 0x1p-90f ? 0x1p64f : scale > 0x1p100f ? 0x1p-64f : 1.0f;
        by = scale * before;
        inverse = __frcp_rn(by);
        if (scale == INFINITY) before = by = 1.0f, inverse = 0.0f;
        prepare = !bounded || before != 1.0f;
    }

    __device__ __forceinline__ float divide(float x) const {
        const float quotient = __fmul_rn(x, inverse);
        const float excess = __fmaf_rn(quotient, by, -x);
        return __fmaf_rn(-excess, inverse, quotient);
    }

    __device__ __forceinline__ uint2 encode8(float (&x)[PIECE]) const {
        if (prepare) {
#pragma unroll
            for (uint32_t i = 0; i < PIECE; i++) x[i] = clamp(__fmul_rn(x[i], before), 512.0f * by);
        }
        return make_uint2(encode4(divide(x[0]), divide(x[1]), divide(x[2]), divide(x[3])),
                          encode4(divide(x[4]), divide(x[5]), divide(x[6]), divide(x[7])));
    }

    __device__ __forceinline__ uint8_t encode1(float x) const {
        if (prepare) x = clamp(__fmul_rn(x, before), 512.0f * by);
        return encode2(divide(x), 0.0f);
    }
};

// The codes of a row, and zeros up to the next one.
__device__ __forceinline__ uint8_t* codes_of(const Output& out, uint32_t row) {
    return static_cast<uint8_t*>(out.to) + row * out.stride;
}

__device__ __forceinline__ void clear_rest(const Output& out, const Team& team) {
    uint8_t* const codes = codes_of(out, team.row);
    for (uint64_t i = out.k + team.first(); i < out.stride; i += team.step()) codes[i] = 0;
}

// Writes a row that its team holds: thread t piece t, then those one step further.
template <typename T, uint32_t COUNT>
__device__ __forceinline__ void finish(const Output& out, Team& team, const Piece<T> (&pieces)[COUNT]) {
    const uint32_t first = team.first(), step = team.step(), end = out.k / PIECE;
    if (out.mode == VALUES) {
        T* const values = static_cast<T*>(out.to) + team.row * out.stride;
#pragma unroll
        for (uint32_t i = 0; i < COUNT; i++) {
            if (first + i * step < end) pieces[i].store(values + uint64_t(first + i * step) * PIECE);
        }
        return;
    }
    float scale = out.scale;
    if (out.mode == TOKEN) {
        float most = 0.0f;
#pragma unroll
        for (uint32_t i = 0; i < COUNT; i++) {
            float values[PIECE];
            pieces[i].widen(values);
            if (first + i * step < end) most = amax8(values, most);
        }
        scale = scale_of(__uint_as_float(team.max(__float_as_uint(most))));
        if (first == 0) out.scales[team.row] = scale;
    }
    Divisor divisor(scale, out.mode != STATIC);
    uint8_t* const codes = codes_of(out, team.row);
    // Threads that share a group: a power of two, and neighbours in a warp.
    const uint32_t sharers = out.group / PIECE;
#pragma unroll
    for (uint32_t i = 0; i < COUNT; i++) {
        const uint32_t piece = first + i * step;
        float values[PIECE];
        pieces[i].widen(values);
        if (out.mode == GROUP) {
            float most = piece < end ? amax8(values, 0.0f) : 0.0f;
            for (uint32_t lanes = sharers / 2; lanes > 0; lanes /= 2) {
                most = max_magnitude(most, __shfl_xor_sync(~0u, most, lanes));
            }
            scale = scale_of(most);
            divisor = Divisor(scale, true);
            if (piece < end && (piece & (sharers - 1)) == 0) {
                const uint32_t shift = 31 - __clz(out.group), groups = (out.k + out.group - 1) >> shift;
                out.scales[uint64_t(team.row) * groups + (piece * PIECE >> shift)] = scale;
            }
        }
        if (piece < end) *reinterpret_cast<uint2*>(codes + uint64_t(piece) * PIECE) = divisor.encode8(values);
    }
    clear_rest(out, team);
}

// Writes a row of which `value(i)` computes elements anew each time; a block, which works alone, has the row.
template <typename T, typename Value>
__device__ __forceinline__ void finish_any(const Output& out, Team& team, Value value) {
    if (out.mode == VALUES) {
        T* const values = static_cast<T*>(out.to) + team.row * out.stride;
        for (uint32_t i = team.thread; i < out.k; i += team.threads) values[i] = from_f32<T>(value(i));
        return;
    }
    uint8_t* const codes = codes_of(out, team.row);
    if (out.mode == GROUP) {
        const uint32_t groups = (out.k + out.group - 1) / out.group, lane = team.thread % 32;
        for (uint32_t group = team.thread / 32; group < groups; group += team.threads / 32) {
            const uint32_t begin = group * out.group, end = min(out.k, begin + out.group);
            float most = 0.0f;
            for (uint32_t i = begin + lane; i < end; i += 32) most = max_magnitude(most, value(i));
            const float scale = scale_of(__uint_as_float(__reduce_max_sync(~0u, __float_as_uint(most))));
            const Divisor divisor(scale, true);
            for (uint32_t i = begin + lane; i < end; i += 32) codes[i] = divisor.encode1(value(i));
            if (lane == 0) out.scales[uint64_t(team.row) * groups + group] = scale;
        }
    } else {
        float scale = out.scale;
        if (out.mode == TOKEN) {
            float most = 0.0f;
            for (uint32_t i = team.thread; i < out.k; i += team.threads) most = max_magnitude(most, value(i));
            scale = scale_of(__uint_as_float(team.max(__float_as_uint(most))));
            if (team.thread == 0) out.scales[team.row] = scale;
        }
        const Divisor divisor(scale, out.mode != STATIC);
        for (uint32_t i = team.thread; i < out.k; i += team.threads) codes[i] = divisor.encode1(value(i));
    }
    clear_rest(out, team);
}
