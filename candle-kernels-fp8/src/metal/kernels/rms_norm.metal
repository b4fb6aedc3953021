// RMS norm of rows, or of the sum of rows and a residual: weight * T(x / sqrt(mean(x^2) + eps)).

// Host twin: `rms_norm` in `rms_norm.rs`.
struct RmsNorm {
    Output out;
    uint stride, residual_stride, sum_stride; // elements from row to row
    uint has_residual;
    float eps;
};

template <typename T>
struct Normed {
    device const T* x;
    device const T* residual; // if there is one
    device const T* weight;
    bool has_residual;
    float root;

    float input(uint i) const {
        return has_residual ? rounded<T>(to_f32(x[i]) + to_f32(residual[i])) : to_f32(x[i]);
    }
    float operator()(uint i) const { return rounded<T>(rounded<T>(input(i) * root) * to_f32(weight[i])); }
};

#define RMS_NORM(NAME, T)                                                                                              \
    kernel void rms_norm_##NAME(PLACE, constant RmsNorm& args [[buffer(0)]], device const T* x [[buffer(1)]],          \
                                device const T* residual [[buffer(2)]], device const T* weight [[buffer(3)]],          \
                                device uchar* to [[buffer(4)]], device float* scales [[buffer(5)]],                    \
                                device T* sum [[buffer(6)]]) {                                                         \
        SHARED uint magnitudes[LANES];                                                                                 \
        SHARED float squares[LANES];                                                                                   \
        Normed<T> values{x + ulong(group) * args.stride, residual + ulong(group) * args.residual_stride, weight,       \
                         args.has_residual != 0, 0.0f};                                                                \
        float square = 0.0f;                                                                                           \
        for (uint i = thread_index; i < args.out.k; i += threads) {                                                    \
            const float value = values.input(i);                                                                       \
            if (values.has_residual) sum[ulong(group) * args.sum_stride + i] = from_f32<T>(value);                     \
            square = fma(value, value, square);                                                                        \
        }                                                                                                              \
        square = sum_of_group(square, squares, threads, lane, simd);                                                   \
        values.root = 1.0f / precise::sqrt(square / float(args.out.k) + args.eps);                                     \
        finish<T>(args.out, to, scales, values, group, thread_index, threads, lane, simd, magnitudes);                 \
    }

RMS_NORM(bf16, bf16)
RMS_NORM(f16, half)
RMS_NORM(f32, float)
