// Codes and scales back to dense weights: the code times the scale, rounded to the scale's type, then to another.

// Host twin: `dequantize` in `dequantize.rs`.
struct Dequantize {
    uint k;
    uint stride; // bytes from row to row of codes
    uint scale_rows, scale_row, scale_run; // scale of (row, k): [row / scale_rows * scale_row + k / scale_run]
    uint scale_type;
};

inline float round_to(float value, uint type) {
    switch (type) {
    case BF16: return rounded<bf16>(value);
    case F16: return rounded<half>(value);
    default: return value;
    }
}

// A group has a row.
#define DEQUANTIZE(NAME, T)                                                                                            \
    kernel void dequantize_##NAME(PLACE, constant Dequantize& args [[buffer(0)]],                                      \
                                  device const e4m3* codes [[buffer(1)]], device const float* scales [[buffer(2)]],    \
                                  device T* out [[buffer(3)]]) {                                                       \
        const uint first = group / args.scale_rows * args.scale_row;                                                   \
        for (uint i = thread_index; i < args.k; i += threads) {                                                        \
            const float value = product(codes[ulong(group) * args.stride + i], scales[first + i / args.scale_run]);    \
            out[ulong(group) * args.k + i] = from_f32<T>(round_to(value, args.scale_type));                            \
        }                                                                                                              \
    }

DEQUANTIZE(bf16, bf16)
DEQUANTIZE(f16, half)
DEQUANTIZE(f32, float)
