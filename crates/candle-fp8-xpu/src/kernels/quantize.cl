// Activations to E4M3.

// What `args.mode` says of scales; the numbers are those of `Mode` in Rust.
#define GROUP 0  // one for each `group` neighbours in a row, which may be all of it
#define STATIC 1 // one that is given
#define TENSOR 2 // one for all rows, of the magnitudes that the kernel `magnitudes` found

// Host twin: `Args` in `quantize.rs`.
typedef struct {
    uint m, k;
    uint x_stride;     // elements from row to row
    uint codes_stride; // bytes from row to row, of which those past k become zero
    uint mode, group;
    uint count;        // of magnitudes
    float scale;       // STATIC
} Args;

// The largest of the work-group's values. Its size is a power of two.
uint largest(uint value, __local uint* scratch) {
    const uint thread = get_local_id(0);
    scratch[thread] = value;
    barrier(CLK_LOCAL_MEM_FENCE);
    for (uint half_of = get_local_size(0) / 2; half_of > 0; half_of /= 2) {
        if (thread < half_of) scratch[thread] = max(scratch[thread], scratch[thread + half_of]);
        barrier(CLK_LOCAL_MEM_FENCE);
    }
    return scratch[0];
}

// The scale for values up to `amax`: amax / 448, 1/448 for zeros, and never subnormal. NaN stays NaN.
float scale_of(float amax) {
    if (amax == 0.0f) amax = 1.0f;
    if (isinf(amax)) return amax;
    // Far from where remainders would be subnormal.
    const float factor = amax < 0x1p-64f ? 0x1p64f : 1.0f;
    const float scale = divide(amax * factor, 448.0f);
    if (scale < 0x1p-126f * factor) return 0x1p-126f;
    return scale * (amax < 0x1p-64f ? 0x1p-64f : 1.0f);
}

// Divides by a positive scale so that the code of the quotient is that of the correctly rounded one.
//
// Scales between 2^-40 and 2^100 are left as they are, others are brought there together with x, by a power of two.
// If a small x loses bits by that, the quotient is far below 2^-10 before and after, where every code is a zero; so
// it is where remainders are too small to be exact. A clamp to 512 scales, which have the code of 448, keeps the
// quotient finite. An infinite scale comes from an infinite x: dividing by it is a product with 0, NaN for
// infinities, else a zero.
uchar code_of(float x, float scale) {
    if (isinf(scale)) return encode(x * 0.0f);
    const float before = scale < 0x1p-40f ? 0x1p64f : scale > 0x1p100f ? 0x1p-64f : 1.0f;
    const float by = scale * before, most = 512.0f * by;
    x *= before;
    x = x > most ? most : x < -most ? -most : x;
    const float quotient = divide(x, by);
    return encode(fabs(quotient) < 0x1p-12f ? copysign(0.0f, x) : quotient);
}

// A work-group quantizes values that share a scale: a group, or a row.
__kernel void quantize(const __global Element* x, __global uchar* codes, __global float* scales,
                       const __global uint* magnitudes, const Args args, __local uint* scratch) {
    const uint groups = (args.k + args.group - 1) / args.group;
    const uint row = get_group_id(0) / groups, group = get_group_id(0) % groups;
    const uint thread = get_local_id(0), threads = get_local_size(0);
    const uint begin = group * args.group, end = min(args.k, begin + args.group);
    const __global Element* values = x + (size_t)row * args.x_stride;
    __global uchar* to = codes + (size_t)row * args.codes_stride;

    float scale = args.scale;
    if (args.mode != STATIC) {
        uint most = 0;
        if (args.mode == TENSOR) {
            for (uint i = thread; i < args.count; i += threads) most = max(most, magnitudes[i]);
        } else {
            for (uint i = begin + thread; i < end; i += threads) most = max_magnitude(most, load_x(values, i));
        }
        scale = scale_of(as_float(largest(most, scratch)));
    }
    for (uint i = begin + thread; i < end; i += threads) to[i] = code_of(load_x(values, i), scale);
    if (group == groups - 1) {
        for (uint i = args.k + thread; i < args.codes_stride; i += threads) to[i] = 0;
    }
    if (thread == 0 && (args.mode == GROUP || get_group_id(0) == 0)) scales[get_group_id(0)] = scale;
}

// The largest magnitude of the rows that each work-group takes, as an integer.
__kernel void magnitudes(const __global Element* x, __global uint* to, const Args args, __local uint* scratch) {
    uint most = 0;
    for (uint row = get_group_id(0); row < args.m; row += get_num_groups(0)) {
        const __global Element* values = x + (size_t)row * args.x_stride;
        for (uint i = get_local_id(0); i < args.k; i += get_local_size(0)) {
            most = max_magnitude(most, load_x(values, i));
        }
    }
    most = largest(most, scratch);
    if (get_local_id(0) == 0) to[get_group_id(0)] = most;
}
