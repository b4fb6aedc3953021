// Values rounded through E4M3 and back, in f32: decode(encode(x / scale)) * scale.

#include "common.cuh"

// Host twin: `Params` in `fake_quantize.rs`.
struct FakeQuantize {
    const void* x;
    const float* scales; // scale of element i: [i / run % scale_count]
    void* out;
    uint64_t count, run, scale_count;
};

template <typename T>
__device__ __forceinline__ void fake_quantize(const FakeQuantize& args) {
    launch_dependents();
    wait_for_inputs();
    const uint64_t step = uint64_t(gridDim.x) * blockDim.x;
    for (uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < args.count; i += step) {
        const float scale = args.scales[args.scale_count == 1 ? 0 : i / args.run % args.scale_count];
        const float x = to_f32(static_cast<const T*>(args.x)[i]);
        const float value = decode(encode2(__fdiv_rn(x, scale), 0.0f));
        static_cast<T*>(args.out)[i] = from_f32<T>(__fmul_rn(value, scale));
    }
}

#define FAKE_QUANTIZE(NAME, T)                                                                                         \
    extern "C" __global__ void __launch_bounds__(256) fake_quantize_##NAME(FakeQuantize args) { fake_quantize<T>(args); }

FAKE_QUANTIZE(bf16, __nv_bfloat16)
FAKE_QUANTIZE(f16, __half)
FAKE_QUANTIZE(f32, float)
