// Activations to E4M3.

// Host twin: `launch` in `quantize.rs`.
struct Quantize {
    Output out;
    uint stride; // elements from row to row
};

// Host twin: `quantize_tensor` in `quantize.rs`.
struct Amax {
    uint m, k;
    uint stride;
};

template <typename T>
struct Loaded {
    device const T* x;
    float operator()(uint i) const { return to_f32(x[i]); }
};

#define QUANTIZE(NAME, T)                                                                                              \
    kernel void quantize_##NAME(PLACE, constant Quantize& args [[buffer(0)]], device const T* x [[buffer(1)]],         \
                                device uchar* codes [[buffer(2)]], device float* scales [[buffer(3)]]) {               \
        SHARED uint exchange[LANES];                                                                                   \
        const Loaded<T> values{x + ulong(group) * args.stride};                                                        \
        finish<T>(args.out, codes, scales, values, group, thread_index, threads, lane, simd, exchange);                \
    }                                                                                                                  \
    /* The largest magnitude of every so many rows. */                                                                 \
    kernel void quantize_##NAME##_amax(PLACE, constant Amax& args [[buffer(0)]], device const T* x [[buffer(1)]],      \
                                       device float* magnitudes [[buffer(2)]]) {                                       \
        SHARED uint exchange[LANES];                                                                                   \
        uint amax = 0;                                                                                                 \
        for (uint row = group; row < args.m; row += groups) {                                                          \
            for (uint i = thread_index; i < args.k; i += threads) {                                                    \
                amax = max(amax, magnitude_of(to_f32(x[ulong(row) * args.stride + i])));                               \
            }                                                                                                          \
        }                                                                                                              \
        amax = max_of_group(amax, exchange, threads, lane, simd);                                                      \
        if (thread_index == 0) magnitudes[group] = as_type<float>(amax);                                               \
    }

QUANTIZE(bf16, bf16)
QUANTIZE(f16, half)
QUANTIZE(f32, float)
