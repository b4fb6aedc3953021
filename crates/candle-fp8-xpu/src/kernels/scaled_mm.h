// The arguments of a product of activations [m, k] with the transpose of a weight [n, k], and its scales.

// Host twin: `Args` in `scaled_mm.rs`. Everything is row-major. Rows of activations and weights start at
// multiples of 16 elements, and what is between their ends is zero.
typedef struct {
    uint m, n, k;
    uint x_stride, weight_stride, out_stride; // elements from row to row
    uint x_scale_row, x_scale_run;            // scale of (row, k): [row * x_scale_row + k / x_scale_run]
    // [row / weight_scale_rows * weight_scale_row + k / weight_scale_run]
    uint weight_scale_rows, weight_scale_row, weight_scale_run;
    uint bias_type, out_type;
} Args;

#define ARGUMENTS                                                                                                      \
    const __global Element *x, const __global float *x_scales, const __global uchar *weight,                           \
        const __global float *weight_scales, const __global void *bias, __global void *out, const Args args

// Scales are constant along K, where the program is compiled so. RUNS: they change at multiples of 16, or of anything
// for the kernel that serves all.

float x_scale_at(const __global float* scales, Args args, uint row, uint k) {
#if X == E4M3
    return scales[(size_t)row * args.x_scale_row + k / args.x_scale_run];
#else
    return 1.0f;
#endif
}

float weight_scale_at(const __global float* scales, Args args, uint row, uint k) {
    return scales[(size_t)(row / args.weight_scale_rows) * args.weight_scale_row + k / args.weight_scale_run];
}

// Where the sum that starts at k ends: before the next change of a scale.
uint run_end(Args args, uint k) {
    uint end = min(args.k, (k / args.weight_scale_run + 1) * args.weight_scale_run);
#if X == E4M3
    end = min(end, (k / args.x_scale_run + 1) * args.x_scale_run);
#endif
    return end;
}

void store_result(const __global void* bias, __global void* out, Args args, uint row, uint col, float value) {
    if (args.bias_type != NONE) value += load_float(bias, col, args.bias_type);
    store_float(out, (size_t)row * args.out_stride + col, value, args.out_type);
}
