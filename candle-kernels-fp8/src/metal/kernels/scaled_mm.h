// The arguments of a product of activations [m, k] with the transpose of a weight [n, k].

// Host twin: `words` in `scaled_mm.rs`. Everything is row-major.
struct ScaledMm {
    uint m, n, k;
    uint x_stride;                 // elements from row to row
    uint weight_stride;            // bytes from row to row
    uint x_scale_row, x_scale_run; // scale of (row, k): [row * x_scale_row + k / x_scale_run]
    uint weight_scale_rows, weight_scale_row, weight_scale_run; // [row / rows * weight_scale_row + k / run]
    uint has_x_scales, has_bias;
    uint bias_type, out_type;
    uint aligned; // whether all rows start at multiples of 16 bytes
};

// Elements that are read at once.
constant constexpr uint PIECE = 16;

// a / b, without a division where runs and blocks are as they mostly are.
inline uint part_of(uint a, uint b) { return a < b ? 0 : b == 128 ? a / 128 : b == 1 ? a : a / b; }

// The scales of rows, along k.
struct Scales {
    device const float* x;
    device const float* weight;

    float of(constant ScaledMm& args, uint row, uint col, uint k) const {
        const uint first = part_of(col, args.weight_scale_rows) * args.weight_scale_row;
        const float scale = weight[first + part_of(k, args.weight_scale_run)];
        return args.has_x_scales ? scale * x[row * args.x_scale_row + part_of(k, args.x_scale_run)] : scale;
    }
};

// Where the run of k ends on which no scale changes.
inline uint run_end(constant ScaledMm& args, uint k) {
    const uint x_end = (part_of(k, args.x_scale_run) + 1) * args.x_scale_run;
    const uint weight_end = (part_of(k, args.weight_scale_run) + 1) * args.weight_scale_run;
    return min(min(x_end, weight_end), args.k);
}

// Sixteen neighbors, those from `end` on being zero and never read; 16 bytes at once where `aligned`.
template <typename To>
inline void unpack(uint4 words, thread To* values, e4m3) {
    for (uint i = 0; i < 4; i++) decode4(words[i], values + 4 * i);
}
template <typename To>
inline void unpack(uint4 words, thread To* values, bf16) {
    for (uint i = 0; i < 8; i++) values[i] = To(to_f32(bf16{ushort(words[i / 2] >> i % 2 * 16)}));
}
template <typename To>
inline void unpack(uint4 words, thread To* values, half) {
    for (uint i = 0; i < 8; i++) values[i] = To(to_f32(as_type<half>(ushort(words[i / 2] >> i % 2 * 16))));
}
template <typename To>
inline void unpack(uint4 words, thread To* values, float) {
    for (uint i = 0; i < 4; i++) values[i] = To(as_type<float>(words[i]));
}

template <typename T, typename To>
inline void load(device const T* row, uint k, uint end, bool aligned, thread To* values) {
    constexpr uint COUNT = 16 / sizeof(T);
    if (aligned && k + PIECE <= end) {
        for (uint i = 0; i < PIECE; i += COUNT) unpack(*(device const uint4*)(row + k + i), values + i, T());
        return;
    }
    for (uint i = 0; i < PIECE; i++) values[i] = k + i < end ? To(to_f32(row[k + i])) : To(0);
}

// An element of an array whose type is known at run time.
inline float load_float(device const uchar* array, uint index, uint type) {
    switch (type) {
    case BF16: return to_f32(((device const bf16*)array)[index]);
    case F16: return to_f32(((device const half*)array)[index]);
    default: return ((device const float*)array)[index];
    }
}

inline void store_float(device uchar* array, ulong index, float value, uint type) {
    switch (type) {
    case BF16: ((device bf16*)array)[index] = from_f32<bf16>(value); break;
    case F16: ((device half*)array)[index] = from_f32<half>(value); break;
    default: ((device float*)array)[index] = value;
    }
}

// Stores one result: the bias is added in f32.
inline void store_result(constant ScaledMm& args, device const uchar* bias, device uchar* out, uint row, uint col,
                         float value) {
    if (args.has_bias) value += load_float(bias, col, args.bias_type);
    store_float(out, ulong(row) * args.n + col, value, args.out_type);
}

// The arguments of each kernel for products.
#define PRODUCT(T)                                                                                                     \
    PLACE, constant ScaledMm &args [[buffer(0)]], device const T *x [[buffer(1)]],                                     \
        device const float *x_scales [[buffer(2)]], device const e4m3 *weight [[buffer(3)]],                           \
        device const float *weight_scales [[buffer(4)]], device const uchar *bias [[buffer(5)]],                       \
        device uchar *out [[buffer(6)]]
