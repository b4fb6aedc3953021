// E4M3 to other float types and back, elementwise. Saturates.

// Host twin: `cast` in `cast.rs`.
struct Cast {
    uint count;
};

// A thread has elements that are `threads` apart: neighbors read neighbors.
constant constexpr uint EACH = 8;

template <typename From, typename To>
inline void cast(uint group, uint thread_index, uint threads, uint count, device const From* from, device To* to) {
    for (uint j = 0; j < EACH; j++) {
        const ulong i = (ulong(group) * EACH + j) * threads + thread_index;
        if (i < count) to[i] = from_f32<To>(to_f32(from[i]));
    }
}

#define CAST(NAME, T)                                                                                                  \
    kernel void cast_##NAME##_to_e4m3(PLACE, constant Cast& args [[buffer(0)]], device const T* from [[buffer(1)]],    \
                                      device e4m3* to [[buffer(2)]]) {                                                 \
        cast(group, thread_index, threads, args.count, from, to);                                                      \
    }                                                                                                                  \
    kernel void cast_e4m3_to_##NAME(PLACE, constant Cast& args [[buffer(0)]], device const e4m3* from [[buffer(1)]],   \
                                    device T* to [[buffer(2)]]) {                                                      \
        cast(group, thread_index, threads, args.count, from, to);                                                      \
    }

CAST(bf16, bf16)
CAST(f16, half)
CAST(f32, float)
