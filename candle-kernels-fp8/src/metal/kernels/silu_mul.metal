// silu(gate) * up, in f32, rounded once.

// Host twin: `silu_mul` in `silu_mul.rs`.
struct SiluMul {
    Output out;
    uint gate_stride, up_stride; // elements from row to row
};

inline float power_of_two(int n) { return as_type<float>(uint(n + 127) << 23); }

// e^x with an error of at most 2 ulp, with the arithmetic of `cpu/exp.rs`, which says why it is so; infinity above
// 88.73.
inline float exponential(float x) {
    x = x > 89.0f ? 89.0f : x;
    x = x < -104.0f ? -104.0f : x;
    const float magic = 12582912.0f; // 1.5 * 2^23
    const float whole = x * 1.44269504f + magic;
    const float n = whole - magic;
    const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    float p = 1.0f / 5040.0f;
    p = p * r + 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    const float y = (p * (r * r) + r) + 1.0f;
    // In two factors, each of them normal.
    const int exponent = int(as_type<uint>(whole) - as_type<uint>(magic)), part = exponent >> 1;
    return y * power_of_two(part) * power_of_two(exponent - part);
}

template <typename T>
struct Activated {
    device const T* gate;
    device const T* up;
    float operator()(uint i) const {
        const float x = to_f32(gate[i]);
        return rounded<T>(x / (1.0f + exponential(-x)) * to_f32(up[i]));
    }
};

#define SILU_MUL(NAME, T)                                                                                              \
    kernel void silu_mul_##NAME(PLACE, constant SiluMul& args [[buffer(0)]], device const T* gate [[buffer(1)]],       \
                                device const T* up [[buffer(2)]], device uchar* to [[buffer(3)]],                      \
                                device float* scales [[buffer(4)]]) {                                                  \
        SHARED uint exchange[LANES];                                                                                   \
        const Activated<T> values{gate + ulong(group) * args.gate_stride, up + ulong(group) * args.up_stride};         \
        finish<T>(args.out, to, scales, values, group, thread_index, threads, lane, simd, exchange);                   \
    }

SILU_MUL(bf16, bf16)
SILU_MUL(f16, half)
SILU_MUL(f32, float)
