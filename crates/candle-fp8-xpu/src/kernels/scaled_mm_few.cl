// Products of few rows: each subgroup reads FEATURES rows of the weight once, 16 codes in each lane at a time, and
// multiplies them with ROWS rows of activations.

// Sixteen neighbours of a row.
#define PIECE 16

void load_codes(const __global uchar* from, float values[PIECE]) {
    const uint4 words = *(const __global uint4*)from;
    const uint parts[4] = {words.x, words.y, words.z, words.w};
    for (uint i = 0; i < PIECE; i++) values[i] = decode(parts[i / 4] >> i % 4 * 8 & 0xff);
}

void load_piece(const __global Element* from, float values[PIECE]) {
#if X == E4M3
    load_codes(from, values);
#elif X == BF16
    const ushort16 bits = vload16(0, from);
    const float16 wide = as_float16(convert_uint16(bits) << 16);
    vstore16(wide, 0, values);
#elif X == F16
    vstore16(vload_half16(0, (const __global half*)from), 0, values);
#else
    vstore16(vload16(0, from), 0, values);
#endif
}

__attribute__((intel_reqd_sub_group_size(LANES))) __kernel void scaled_mm_few(ARGUMENTS) {
    const uint first_col = (get_group_id(0) * get_num_sub_groups() + get_sub_group_id()) * FEATURES;
    const uint first_row = get_group_id(1) * ROWS, lane = get_sub_group_local_id();
    if (first_col >= args.n) return;
    uint rows[ROWS], cols[FEATURES];
    // What is past the end is computed again, and not stored.
    for (uint i = 0; i < ROWS; i++) rows[i] = min(first_row + i, args.m - 1);
    for (uint j = 0; j < FEATURES; j++) cols[j] = min(first_col + j, args.n - 1);

    float sums[ROWS][FEATURES];
    for (uint i = 0; i < ROWS; i++) {
        for (uint j = 0; j < FEATURES; j++) sums[i][j] = 0.0f;
    }
    for (uint k = lane * PIECE; k < args.k; k += LANES * PIECE) {
        float w[FEATURES][PIECE];
        for (uint j = 0; j < FEATURES; j++) load_codes(weight + (size_t)cols[j] * args.weight_stride + k, w[j]);
        for (uint i = 0; i < ROWS; i++) {
            float values[PIECE];
            load_piece(x + (size_t)rows[i] * args.x_stride + k, values);
            for (uint j = 0; j < FEATURES; j++) {
#if RUNS
                float part = 0.0f;
                for (uint p = 0; p < PIECE; p++) part = fma(values[p], w[j][p], part);
                const float scale =
                    x_scale_at(x_scales, args, rows[i], k) * weight_scale_at(weight_scales, args, cols[j], k);
                sums[i][j] = fma(part, scale, sums[i][j]);
#else
                for (uint p = 0; p < PIECE; p++) sums[i][j] = fma(values[p], w[j][p], sums[i][j]);
#endif
            }
        }
    }
    for (uint i = 0; i < ROWS; i++) {
        for (uint j = 0; j < FEATURES; j++) {
            float total = sub_group_reduce_add(sums[i][j]);
#if !RUNS
            total *= x_scale_at(x_scales, args, rows[i], 0) * weight_scale_at(weight_scales, args, cols[j], 0);
#endif
            if (lane == 0 && first_row + i < args.m && first_col + j < args.n) {
                store_result(bias, out, args, rows[i], cols[j], total);
            }
        }
    }
}
