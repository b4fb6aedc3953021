// Values rounded through E4M3 and back, in f32: decode(encode(x / scale)) * scale.

// Host twin: `fake_quantize` in `fake_quantize.rs`.
struct FakeQuantize {
    uint count;
    uint run, scale_count; // scale of element i: [i / run % scale_count]
};

#define FAKE_QUANTIZE(NAME, T)                                                                                         \
    kernel void fake_quantize_##NAME(PLACE, constant FakeQuantize& args [[buffer(0)]],                                 \
                                     device const T* x [[buffer(1)]], device const float* scales [[buffer(2)]],        \
                                     device T* out [[buffer(3)]]) {                                                    \
        const ulong i = ulong(group) * threads + thread_index;                                                         \
        if (i >= args.count) return;                                                                                   \
        const float scale = scales[uint(i) / args.run % args.scale_count];                                             \
        out[i] = from_f32<T>(product(from_f32<e4m3>(quotient(to_f32(x[i]), scale)), scale));                           \
    }

FAKE_QUANTIZE(bf16, bf16)
FAKE_QUANTIZE(f16, half)
FAKE_QUANTIZE(f32, float)
