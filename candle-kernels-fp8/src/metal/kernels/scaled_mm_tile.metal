// Many rows of activations, on the SIMD groups' 8x8 matrices. A group of threads computes a tile of ROWS tokens by COLS
// features; chunks of K, cut where a scale changes, go through threadgroup memory as S. A run of K on which no scale
// changes is one sum in f32; it is multiplied by the product of its two scales and added to the total.
//
// Which thread holds which element of a matrix is not documented, so sums go through threadgroup memory to where their
// scales are known.

constant constexpr uint THREADS = 128;
constant constexpr uint COLS = 64;
constant constexpr uint DEPTH = 32;
constant constexpr uint STRIDE = DEPTH + 8; // from row to row of a chunk, in elements

// Words of threadgroup memory for a tile of so many rows: two chunks, or the sums.
constexpr uint tile_words(uint rows, uint size) {
    return (rows + COLS) * STRIDE * size / 4 > rows * COLS ? (rows + COLS) * STRIDE * size / 4 : rows * COLS;
}

template <typename T, typename S>
inline void stage(device const T* from, uint stride, uint first, uint count, uint rows, uint k, uint end, bool aligned,
                  threadgroup S* to, uint thread_index) {
    for (uint piece = thread_index; piece < rows * (DEPTH / PIECE); piece += THREADS) {
        const uint row = piece / (DEPTH / PIECE), at = piece % (DEPTH / PIECE) * PIECE;
        const bool inside = first + row < count;
        S values[PIECE];
        load(from + ulong(first + row) * stride, k + at, inside ? end : 0, aligned, values);
        for (uint i = 0; i < PIECE; i++) to[row * STRIDE + at + i] = values[i];
    }
}

// SIMD groups are side by side: DOWN of them along tokens, the others along features.
template <typename T, typename S, uint ROWS, uint DOWN>
inline void tile(constant ScaledMm& args, device const T* x, device const e4m3* weight, Scales scales,
                 device const uchar* bias, device uchar* out, threadgroup float* memory, uint group, uint thread_index,
                 uint simd) {
    constexpr uint ACROSS = THREADS / LANES / DOWN;
    constexpr uint HIGH = ROWS / DOWN / 8, WIDE = COLS / ACROSS / 8; // matrices of a SIMD group
    constexpr uint EACH = ROWS * COLS / THREADS;
    threadgroup S* const x_tile = (threadgroup S*)memory;
    threadgroup S* const w_tile = x_tile + ROWS * STRIDE;

    const uint tiles = (args.n + COLS - 1) / COLS;
    const uint row = group / tiles * ROWS, col = group % tiles * COLS;
    const uint my_row = simd / ACROSS * (ROWS / DOWN), my_col = simd % ACROSS * (COLS / ACROSS);

    float totals[EACH] = {};
    for (uint run = 0; run < args.k;) {
        const uint end = run_end(args, run);
        simdgroup_matrix<float, 8, 8> sums[HIGH][WIDE];
        for (uint i = 0; i < HIGH; i++) {
            for (uint j = 0; j < WIDE; j++) sums[i][j] = make_filled_simdgroup_matrix<float, 8>(0.0f);
        }
        for (uint k = run; k < end; k += DEPTH) {
            const bool aligned = args.aligned != 0 && k % PIECE == 0;
            stage<T, S>(x, args.x_stride, row, args.m, ROWS, k, end, aligned, x_tile, thread_index);
            stage<e4m3, S>(weight, args.weight_stride, col, args.n, COLS, k, end, aligned, w_tile, thread_index);
            threadgroup_barrier(mem_flags::mem_threadgroup);
            for (uint depth = 0; depth < DEPTH; depth += 8) {
                simdgroup_matrix<S, 8, 8> a[HIGH], b[WIDE];
                for (uint i = 0; i < HIGH; i++) {
                    simdgroup_load(a[i], x_tile + (my_row + i * 8) * STRIDE + depth, STRIDE);
                }
                for (uint j = 0; j < WIDE; j++) {
                    simdgroup_load(b[j], w_tile + (my_col + j * 8) * STRIDE + depth, STRIDE, ulong2(0), true);
                }
                for (uint i = 0; i < HIGH; i++) {
                    for (uint j = 0; j < WIDE; j++) simdgroup_multiply_accumulate(sums[i][j], a[i], b[j], sums[i][j]);
                }
            }
            threadgroup_barrier(mem_flags::mem_threadgroup);
        }
        for (uint i = 0; i < HIGH; i++) {
            for (uint j = 0; j < WIDE; j++) {
                simdgroup_store(sums[i][j], memory + (my_row + i * 8) * COLS + my_col + j * 8, COLS);
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (uint i = 0; i < EACH; i++) {
            const uint at = i * THREADS + thread_index;
            // Those past the end are not stored: any scale will do.
            const uint token = min(row + at / COLS, args.m - 1), feature = min(col + at % COLS, args.n - 1);
            totals[i] = fma(memory[at], scales.of(args, token, feature, run), totals[i]);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        run = end;
    }
    for (uint i = 0; i < EACH; i++) {
        const uint at = i * THREADS + thread_index, token = row + at / COLS, feature = col + at % COLS;
        if (token < args.m && feature < args.n) store_result(args, bias, out, token, feature, totals[i]);
    }
}

#define TILE(NAME, T, S, ROWS, DOWN)                                                                                   \
    kernel void scaled_mm_tile_##NAME##_##ROWS(PRODUCT(T)) {                                                           \
        SHARED float memory[tile_words(ROWS, sizeof(S))];                                                              \
        tile<T, S, ROWS, DOWN>(args, x, weight, Scales{x_scales, weight_scales}, bias, out, memory, group,             \
                               thread_index, simd);                                                                    \
    }

// Codes are exact in half precision, and so are products of two of them in f32. BF16 has exponents that half precision
// lacks.
#define TILES(NAME, T, S)                                                                                              \
    TILE(NAME, T, S, 16, 1)                                                                                            \
    TILE(NAME, T, S, 64, 2)

TILES(e4m3, e4m3, half)
TILES(bf16, bf16, float)
TILES(f16, half, half)
TILES(f32, float, float)
