// What every kernel uses: E4M3 codes, float types, positions. The sources are compiled on the device, one library a
// file, each behind this one; and on the host as C++, where `SHARED` is something else.

#include <metal_stdlib>
using namespace metal;

// Results are those of the CPU bit by bit only if products and sums are rounded one by one.
#pragma METAL fp contract(off)
#pragma clang fp contract(off)

// Memory that the threads of a group share.
#ifndef SHARED
#define SHARED threadgroup
#endif

// A kernel's first arguments. Grids have one dimension, groups have whole SIMD groups of 32 threads.
#define PLACE                                                                                                          \
    uint group [[threadgroup_position_in_grid]], uint groups [[threadgroups_per_grid]],                                \
        uint thread_index [[thread_position_in_threadgroup]], uint threads [[threads_per_threadgroup]],                \
        uint lane [[thread_index_in_simdgroup]], uint simd [[simdgroup_index_in_threadgroup]]

constant constexpr uint LANES = 32;

// Float types of arguments whose type is known at run time; the numbers are those of `Float` in Rust.
constant constexpr uint BF16 = 0, F16 = 1;

constant constexpr uint INFINITY_BITS = 0x7f800000, MIN_NORMAL_BITS = 0x00800000;

// BF16 as its bits: older versions of the language have no such type.
struct bf16 {
    ushort bits;
};

// E4M3 as its bits.
struct e4m3 {
    uchar bits;
};

inline float to_f32(float value) { return value; }
inline float to_f32(half value) { return float(value); }
inline float to_f32(bf16 value) { return as_type<float>(uint(value.bits) << 16); }

// Exact. Under half precision's exponents, which have bias 15 and not 7, a code is 256 times too small; its subnormals
// are then those of half precision.
inline float to_f32(e4m3 code) {
    const uint magnitude = code.bits & 0x7f;
    const ushort bits = ushort(magnitude << 7 | uint(code.bits & 0x80) << 8);
    const float value = float(as_type<half>(bits)) * 256.0f;
    return magnitude == 0x7f ? as_type<float>(0x7fc00000u) : value;
}

// Four codes, the first one in the lowest byte: as above, two at a time, unless one of them is NaN.
template <typename To>
inline void decode4(uint codes, thread To* values) {
    const half2 even = as_type<half2>((codes & 0x007f007f) << 7 | (codes & 0x00800080) << 8);
    const half2 odd = as_type<half2>((codes & 0x7f007f00) >> 1 | (codes & 0x80008000));
    for (uint i = 0; i < 2; i++) {
        values[2 * i] = To(float(even[i]) * 256.0f);
        values[2 * i + 1] = To(float(odd[i]) * 256.0f);
    }
    if (((codes & 0x7f7f7f7f) + 0x01010101) & 0x80808080) {
        for (uint i = 0; i < 4; i++) values[i] = To(to_f32(e4m3{uchar(codes >> i * 8)}));
    }
}

// Rounds to nearest, ties to even. E4M3 is clamped to +-448; NaN stays NaN. By integers, as devices may take subnormal
// values for zeros.
template <typename T>
inline T from_f32(float value);
template <>
inline float from_f32<float>(float value) {
    return value;
}
template <>
inline half from_f32<half>(float value) {
    return half(value);
}
template <>
inline bf16 from_f32<bf16>(float value) {
    const uint bits = as_type<uint>(value);
    const bool nan = (bits & 0x7fffffff) > INFINITY_BITS;
    return bf16{ushort((nan ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline e4m3 from_f32<e4m3>(float value) {
    const uint bits = as_type<uint>(value), sign = bits >> 24 & 0x80, magnitude = bits & 0x7fffffff;
    const uint clamped = min(magnitude, 0x43e00000u);
    // Below 2^-6 codes are multiples of 2^-9, which is what adding 2^14 rounds to.
    const uint subnormal = as_type<uint>(as_type<float>(clamped) + 16384.0f) - as_type<uint>(16384.0f);
    // From there on, 3 of the 23 mantissa bits stay. A carry out of the mantissa raises the exponent, as it should.
    const uint normal = ((clamped + 0x7ffff + (clamped >> 20 & 1)) >> 20) - (120 << 3);
    const uint code = magnitude > INFINITY_BITS ? 0x7f : clamped < 0x3c800000 ? subnormal : normal;
    return e4m3{uchar(sign | code)};
}

// A value as a type holds it.
template <typename T>
inline float rounded(float value) {
    return to_f32(from_f32<T>(value));
}

// x / scale, for codes: of subnormal x too, which devices may take for zero. `scale` is not subnormal.
inline float quotient(float x, float scale) {
    const uint bits = as_type<uint>(x), magnitude = bits & 0x7fffffff;
    // From 2^-100 on, the code is zero anyhow.
    if (magnitude == 0 || magnitude >= MIN_NORMAL_BITS || as_type<uint>(scale) >= 0x0d800000) return x / scale;
    // Subnormals count steps of 2^-149. The factors 2^126 and 2^-23 are exact.
    const float steps = float(magnitude) / (scale * as_type<float>(0x7e800000u)) * as_type<float>(0x34000000u);
    return bits >> 31 ? -steps : steps;
}

// code * scale, rounded once; where scale or result are subnormal, which devices may take for zero, by integers. A
// scale has no sign.
inline float product(e4m3 code, float scale) {
    const uint bits = as_type<uint>(scale), magnitude = code.bits & 0x7f;
    // From 2^-117 on, the smallest code gives a normal result.
    if (bits >= 0x05000000 || magnitude == 0x7f) return to_f32(code) * scale;
    // The code is a number of steps of 2^-9, the scale one of 2^-149, both shifted by what their exponents say.
    const uint code_steps = magnitude < 8 ? magnitude : 8 + (magnitude & 7);
    const uint scale_steps = bits < MIN_NORMAL_BITS ? bits : MIN_NORMAL_BITS + (bits & 0x7fffff);
    const uint code_shift = magnitude < 8 ? 0 : (magnitude >> 3) - 1;
    const uint scale_shift = bits < MIN_NORMAL_BITS ? 0 : (bits >> 23) - 1;
    const uint sign = uint(code.bits & 0x80) << 24;
    uint steps = code_steps * scale_steps; // 28 bits
    if (steps == 0) return as_type<float>(sign);
    const int shift = int(code_shift + scale_shift) - 9; // of steps of 2^-149
    // To 24 bits, or fewer if these are not whole steps.
    const int drop = max(int(32 - clz(steps)) - 24, -shift);
    if (drop > 0) {
        steps = (steps + (1u << (drop - 1)) - 1 + (steps >> drop & 1)) >> drop;
    } else {
        steps <<= -drop;
    }
    // The 24th bit, if there is one, adds one to the exponent.
    return as_type<float>(sign | ((uint(shift + drop) << 23) + steps));
}
