// silu(gate) times up, the inner activation of a gated MLP, with the roundings of the CPU.

// Host twin: `Args` in `silu_mul.rs`.
typedef struct {
    uint m, k;
    uint gate_stride, up_stride, out_stride; // elements from row to row; of `out` those past k become zero
} Args;

// e^x with an error of at most 2 ulp, as the CPU has it: e^x = 2^n e^r with |r| <= ln 2 / 2, and a Taylor polynomial.
float exp_of(float x) {
    x = x > 89.0f ? 89.0f : x;
    x = x < -104.0f ? -104.0f : x;
    // Where the next f32 is 1 apart: adding it rounds to a whole number, which is then in the low bits.
    const float whole_at = 0x1.8p23f;
    const float whole = x * 1.44269504088896341f + whole_at, n = whole - whole_at;
    // ln 2 in two parts, the first of nine significant bits.
    const float r = (x - n * 0.693359375f) - n * -2.12194440054690583e-4f;
    float p = 1.0f / 5040.0f;
    p = p * r + 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    const float y = (p * (r * r) + r) + 1.0f;
    // 2^n in two factors, each of them normal.
    const int power = (int)(as_uint(whole) - as_uint(whole_at)), half_of = power >> 1;
    return y * as_float((uint)(half_of + 127) << 23) * as_float((uint)(power - half_of + 127) << 23);
}

float silu(float gate) {
    const float divisor = 1.0f + exp_of(-gate);
    // Exact; tiny gates are among these.
    if (divisor == 2.0f) return gate * 0.5f;
    if (isinf(divisor)) return gate * 0.0f;
    if (isinf(gate) || isnan(gate)) return gate;
    // The inverse of a large divisor would be subnormal.
    const bool large = divisor > 0x1p100f;
    return divide(gate, divisor * (large ? 0x1p-64f : 1.0f)) * (large ? 0x1p-64f : 1.0f);
}

__kernel void silu_mul(const __global Element* gate, const __global Element* up, __global Element* out,
                       const Args args) {
    const uint row = get_global_id(1), i = get_global_id(0);
    if (i >= args.out_stride) return;
    float value = 0.0f;
    if (i < args.k) {
        value = silu(load_x(gate, (size_t)row * args.gate_stride + i)) * load_x(up, (size_t)row * args.up_stride + i);
    }
    store_float(out, (size_t)row * args.out_stride + i, value, X);
}
