// Products of many rows without matrix units, on any device.
//
// A work-group of 16 by 16 work-items computes a tile of 16 ROWS tokens by 16 COLS features, a work-item ROWS by COLS
// of them in registers. Steps of 16 along K go through local memory as f32, where each value is decoded once for all of
// the tile. They lie there transposed: what work-items read of one k are neighbours.

#define SIDE 16
#define STEP 16
#define TOKENS (SIDE * ROWS)
#define FEATURES (SIDE * COLS)
// Neighbours along K that a work-item loads at once.
#define PIECE 4
#define PIECES (STEP / PIECE)

float4 decode_piece(const __global uchar* from) {
    const uint codes = *(const __global uint*)from;
    return (float4)(decode(codes & 0xff), decode(codes >> 8 & 0xff), decode(codes >> 16 & 0xff), decode(codes >> 24));
}

float4 load_piece(const __global Element* from) {
#if X == E4M3
    return decode_piece(from);
#elif X == BF16
    return as_float4(convert_uint4(vload4(0, from)) << 16);
#elif X == F16
    return vload_half4(0, (const __global half*)from);
#else
    return vload4(0, from);
#endif
}

// Where there are subgroups, compilers are kept from larger ones than registers suffice for.
#ifdef LANES
__attribute__((intel_reqd_sub_group_size(LANES)))
#endif
__attribute__((reqd_work_group_size(SIDE, SIDE, 1)))
__kernel void scaled_mm_tiled(ARGUMENTS) {
    // One more than there are: rows that are written together start in different banks.
    __local float x_tile[STEP][TOKENS + 1], w_tile[STEP][FEATURES + 1];
    const uint my_col = get_local_id(0), my_row = get_local_id(1), thread = my_row * SIDE + my_col;
    const uint first_row = get_group_id(1) * TOKENS, first_col = get_group_id(0) * FEATURES;
    // What is past the end is computed again, and not stored.
    uint rows[ROWS], cols[COLS];
    for (uint i = 0; i < ROWS; i++) rows[i] = min(first_row + my_row * ROWS + i, args.m - 1);
    for (uint j = 0; j < COLS; j++) cols[j] = min(first_col + my_col + SIDE * j, args.n - 1);

    float sums[ROWS][COLS];
#if RUNS
    float totals[ROWS][COLS];
#endif
    for (uint i = 0; i < ROWS; i++) {
        for (uint j = 0; j < COLS; j++) {
            sums[i][j] = 0.0f;
#if RUNS
            totals[i][j] = 0.0f;
#endif
        }
    }
    uint end = run_end(args, 0);
    for (uint step = 0; step < args.k; step += STEP) {
        for (uint piece = thread; piece < TOKENS * PIECES; piece += SIDE * SIDE) {
            const uint line = piece / PIECES, k = piece % PIECES * PIECE;
            const size_t row = min(first_row + line, args.m - 1);
            const float4 values = load_piece(x + row * args.x_stride + step + k);
            x_tile[k][line] = values.x, x_tile[k + 1][line] = values.y;
            x_tile[k + 2][line] = values.z, x_tile[k + 3][line] = values.w;
        }
        for (uint piece = thread; piece < FEATURES * PIECES; piece += SIDE * SIDE) {
            const uint line = piece / PIECES, k = piece % PIECES * PIECE;
            const size_t col = min(first_col + line, args.n - 1);
            const float4 values = decode_piece(weight + col * args.weight_stride + step + k);
            w_tile[k][line] = values.x, w_tile[k + 1][line] = values.y;
            w_tile[k + 2][line] = values.z, w_tile[k + 3][line] = values.w;
        }
        barrier(CLK_LOCAL_MEM_FENCE);
        // Not all at once: what is read ahead takes registers, too.
        #pragma unroll 4
        for (uint k = 0; k < STEP; k++) {
            float w[COLS];
            for (uint j = 0; j < COLS; j++) w[j] = w_tile[k][my_col + SIDE * j];
            for (uint i = 0; i < ROWS; i++) {
                const float value = x_tile[k][my_row * ROWS + i];
                for (uint j = 0; j < COLS; j++) sums[i][j] = fma(value, w[j], sums[i][j]);
            }
        }
        barrier(CLK_LOCAL_MEM_FENCE);
#if RUNS
        if (step + STEP >= end) {
            for (uint i = 0; i < ROWS; i++) {
                const float x_scale = x_scale_at(x_scales, args, rows[i], step);
                for (uint j = 0; j < COLS; j++) {
                    const float scale = x_scale * weight_scale_at(weight_scales, args, cols[j], step);
                    totals[i][j] = fma(sums[i][j], scale, totals[i][j]);
                    sums[i][j] = 0.0f;
                }
            }
            if (step + STEP < args.k) end = run_end(args, step + STEP);
        }
#endif
    }
    for (uint i = 0; i < ROWS; i++) {
        for (uint j = 0; j < COLS; j++) {
            if (first_row + my_row * ROWS + i >= args.m || first_col + my_col + SIDE * j >= args.n) continue;
#if RUNS
            const float total = totals[i][j];
#else
            const float scale =
                x_scale_at(x_scales, args, rows[i], 0) * weight_scale_at(weight_scales, args, cols[j], 0);
            const float total = sums[i][j] * scale;
#endif
            store_result(bias, out, args, rows[i], cols[j], total);
        }
    }
}
