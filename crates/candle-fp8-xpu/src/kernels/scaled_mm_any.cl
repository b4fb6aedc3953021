// Products of any sizes and scales, on any device: for what no other kernel serves, and one row without subgroups.
//
// A work-group computes a tile of ROWS tokens by COLS features, a work-item one result. Chunks of K go through local
// memory as f32.

#define CHUNK 32

__kernel __attribute__((reqd_work_group_size(COLS, ROWS, 1))) void scaled_mm_any(ARGUMENTS) {
    // Padded against bank conflicts.
    __local float x_tile[ROWS][CHUNK + 1], w_tile[COLS][CHUNK + 1];
    const uint my_col = get_local_id(0), my_row = get_local_id(1), thread = my_row * COLS + my_col;
    const uint first_row = get_group_id(1) * ROWS, first_col = get_group_id(0) * COLS;
    // What is past the end is computed again, and not stored.
    const uint row = min(first_row + my_row, args.m - 1), col = min(first_col + my_col, args.n - 1);

    float sum = 0.0f, total = 0.0f;
    uint start = 0, end = 0; // of the sum under way
    for (uint chunk = 0; chunk < args.k; chunk += CHUNK) {
        for (uint i = thread; i < ROWS * CHUNK; i += ROWS * COLS) {
            const uint from = min(first_row + i / CHUNK, args.m - 1), k = chunk + i % CHUNK;
            x_tile[i / CHUNK][i % CHUNK] = k < args.k ? load_x(x, (size_t)from * args.x_stride + k) : 0.0f;
        }
        for (uint i = thread; i < COLS * CHUNK; i += ROWS * COLS) {
            const uint from = min(first_col + i / CHUNK, args.n - 1), k = chunk + i % CHUNK;
            w_tile[i / CHUNK][i % CHUNK] = k < args.k ? decode(weight[(size_t)from * args.weight_stride + k]) : 0.0f;
        }
        barrier(CLK_LOCAL_MEM_FENCE);
        const uint chunk_end = min(chunk + CHUNK, args.k);
        for (uint k = chunk; k < chunk_end;) {
            if (k == end) start = k, end = run_end(args, k);
            const uint until = min(end, chunk_end);
            for (; k < until; k++) sum = fma(x_tile[my_row][k - chunk], w_tile[my_col][k - chunk], sum);
            if (k < end) break; // the sum goes on in the next chunk
            const float scale =
                x_scale_at(x_scales, args, row, start) * weight_scale_at(weight_scales, args, col, start);
            total = fma(sum, scale, total);
            sum = 0.0f;
        }
        barrier(CLK_LOCAL_MEM_FENCE);
    }
    if (first_row + my_row < args.m && first_col + my_col < args.n) store_result(bias, out, args, row, col, total);
}
