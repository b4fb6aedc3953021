// What every kernel uses: E4M3 codes, float types, divisions. OpenCL C 1.2, without extensions.

// The CPU rounds every product; where one is not to be rounded, it says fma.
#pragma OPENCL FP_CONTRACT OFF

// Types of elements; the numbers are those of `Element` in Rust.
#define BF16 0
#define F16 1
#define F32 2
#define E4M3 3
#define NONE 4

// Of activations.
#if X == E4M3
typedef uchar Element;
#elif X == F32
typedef float Element;
#else
typedef ushort Element;
#endif

#define SIGN 0x80000000u
#define MAGNITUDE 0x7fffffffu
#define INFINITE 0x7f800000u

// The value of a code, exactly.
//
// A normal code holds its exponent and mantissa where f32 has them, 20 bits further down and with bias 7, not 127. A
// subnormal one counts steps of 2^-9; no f32 on its way is subnormal, as devices may flush those to zero.
float decode(uint code) {
    const uint magnitude = code & 0x7f;
    const uint normal = (magnitude << 20) + (120u << 23);
    const uint steps = as_uint(as_float(magnitude << 20 | 121u << 23) - as_float(121u << 23));
    uint bits = magnitude < 8 ? steps : normal;
    bits = magnitude == 0x7f ? 0x7fc00000u : bits;
    return as_float(bits | (code & 0x80) << 24);
}

// The code nearest to a value, ties to even, clamped to +-448. NaN becomes the NaN of the same sign.
uchar encode(float value) {
    const uint bits = as_uint(value), magnitude = bits & MAGNITUDE;
    const uint clamped = min(magnitude, as_uint(448.0f));
    // Below 2^-6 codes are multiples of 2^-9, which is what adding 2^14 rounds an f32 to.
    const uint subnormal = as_uint(as_float(clamped) + 16384.0f) - as_uint(16384.0f);
    // From there on 3 bits of the mantissa stay, and a carry out of it raises the exponent.
    const uint normal = ((clamped + 0x7ffff + (clamped >> 20 & 1)) >> 20) - (120 << 3);
    uint code = clamped < 0x3c800000u ? subnormal : normal;
    code = magnitude > INFINITE ? 0x7f : code;
    return (uchar)(bits >> 24 & 0x80 | code);
}

// a / b rounded to nearest, whatever the device's own division does, if neither b nor any intermediate
// result is subnormal or overflows: |b| and |a / b| between 2^-100 and 2^100, say. NaN where one of them is.
//
// The device's quotient is off by 2.5 steps at most; one correction brings it within a step. Then remainders are
// exact, and the smallest tells the nearest quotient. No quotient of floats is halfway between two.
float divide(float a, float b) {
    const float inverse = 1.0f / b;
    float quotient = a * inverse;
    quotient = fma(fma(-quotient, b, a), inverse, quotient);
    float best = quotient, least = fabs(fma(-quotient, b, a));
    for (int step = -1; step <= 1; step += 2) {
        const float other = as_float(as_uint(quotient) + step);
        const float remainder = fabs(fma(-other, b, a));
        if (remainder < least) best = other, least = remainder;
    }
    return best;
}

// The larger of two magnitudes: as integers they sort as the floats do, with NaN above infinity.
uint max_magnitude(uint most, float value) { return max(most, as_uint(value) & MAGNITUDE); }

float widen_bf16(uint bits) { return as_float(bits << 16); }

ushort narrow_bf16(float value) {
    const uint bits = as_uint(value);
    const uint rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, quiet = bits >> 16 | 0x40;
    return (ushort)((bits & MAGNITUDE) > INFINITE ? quiet : rounded);
}

float load_float(const __global void* array, size_t index, uint type) {
    switch (type) {
    case BF16: return widen_bf16(((const __global ushort*)array)[index]);
    case F16: return vload_half(index, (const __global half*)array);
    case F32: return ((const __global float*)array)[index];
    default: return decode(((const __global uchar*)array)[index]);
    }
}

void store_float(__global void* array, size_t index, float value, uint type) {
    switch (type) {
    case BF16: ((__global ushort*)array)[index] = narrow_bf16(value); break;
    case F16: vstore_half_rte(value, index, (__global half*)array); break;
    default: ((__global float*)array)[index] = value;
    }
}

// An activation's value.
float load_x(const __global Element* x, size_t index) { return load_float(x, index, X); }
