// Products of any sizes and scales, by plain f32 arithmetic: for what no other kernel serves.
//
// A block computes a tile of ROWS tokens by COLS features. Chunks of K go through shared memory as f32, while the next
// chunk's bytes are already on their way to registers. A run of K on which no scale changes, cut at multiples of 512,
// is one sum; it is multiplied by the product of its two scales and added to the total.

#include <type_traits>

#include "pieces.cuh"
#include "scaled_mm.cuh"

constexpr uint32_t THREADS = 256;
constexpr uint32_t LONGEST_SUM = 512;

// Sixteen bytes of a row, as elements.
template <typename T>
struct Piece {
    static constexpr uint32_t COUNT = PIECE_BYTES / sizeof(T);
    uint4 bytes;

    // Writes the values one below the other, `stride` apart.
    __device__ __forceinline__ void store(float* to, uint32_t stride) const {
        T elements[COUNT];
        memcpy(elements, &bytes, sizeof bytes);
#pragma unroll
        for (uint32_t i = 0; i < COUNT; i++) {
            if constexpr (std::is_same_v<T, uint8_t>) {
                to[i * stride] = decode(elements[i]);
            } else {
                to[i * stride] = to_f32(elements[i]);
            }
        }
    }
};

// A thread's share of a tile of rows: pieces are dealt out so that neighbouring threads have neighbouring rows.
template <typename T, uint32_t ROWS, uint32_t CHUNK>
struct Share {
    static constexpr uint32_t PIECES = ROWS * CHUNK / Piece<T>::COUNT;
    static constexpr uint32_t EACH = (PIECES + THREADS - 1) / THREADS;
    Piece<T> pieces[EACH];

    // From column k on; what is past `rows` or `end` is zero and never read. `address` says where the piece of a row
    // and column is.
    template <typename F>
    __device__ __forceinline__ void load(F address, uint32_t first, uint32_t rows, uint32_t k, uint32_t end) {
#pragma unroll
        for (uint32_t i = 0; i < EACH; i++) {
            const uint32_t piece = threadIdx.x + i * THREADS, row = first + piece % ROWS;
            const uint32_t at = k + piece / ROWS * Piece<T>::COUNT;
            const bool inside = piece < PIECES && row < rows && at < end;
            const uint32_t count = inside ? min(end - at, Piece<T>::COUNT) * sizeof(T) : 0;
            pieces[i].bytes = load_bytes(inside ? address(row, at) : nullptr, count);
        }
    }
    // Into [CHUNK][STRIDE].
    template <uint32_t STRIDE>
    __device__ __forceinline__ void store(float* to) const {
#pragma unroll
        for (uint32_t i = 0; i < EACH; i++) {
            uint32_t piece = threadIdx.x + i * THREADS;
            if (piece < PIECES) {
                pieces[i].store(to + piece / ROWS * Piece<T>::COUNT * STRIDE + piece % ROWS, STRIDE);
            }
        }
    }
};

// EACH_ROWS by EACH_COLS results for each thread.
template <typename T, uint32_t ROWS, uint32_t COLS, uint32_t CHUNK, uint32_t EACH_ROWS, uint32_t EACH_COLS>
__device__ __forceinline__ void any(const ScaledMm& args) {
    static_assert(ROWS / EACH_ROWS * (COLS / EACH_COLS) == THREADS);
    // Padded against bank conflicts, by a multiple of what a thread reads at once.
    constexpr uint32_t X_STRIDE = ROWS + 4, W_STRIDE = COLS + 4;
    __shared__ float x_tile[CHUNK * X_STRIDE], w_tile[CHUNK * W_STRIDE];

    const uint32_t across = (args.n + COLS - 1) / COLS;
    const uint32_t row = blockIdx.x / across * ROWS, col = blockIdx.x % across * COLS;
    const uint32_t my_row = threadIdx.x / (COLS / EACH_COLS) * EACH_ROWS;
    const uint32_t my_col = threadIdx.x % (COLS / EACH_COLS) * EACH_COLS;

    launch_dependents();
    wait_for_inputs();
    Share<T, ROWS, CHUNK> x;
    Share<uint8_t, COLS, CHUNK> w;
    auto load = [&](uint32_t k) {
        auto x_piece = [&](uint32_t row, uint32_t k) {
            return reinterpret_cast<const uint8_t*>(static_cast<const T*>(args.x) + uint64_t(row) * args.x_stride + k);
        };
        x.load(x_piece, row, args.m, k, args.k);
        w.load([&](uint32_t row, uint32_t k) { return weight_piece(args, row, k); }, col, args.n, k, args.k);
    };
    load(0);

    float sums[EACH_ROWS][EACH_COLS] = {}, total[EACH_ROWS][EACH_COLS] = {};
    uint32_t run = 0, run_end = 0; // of the sum under way
    for (uint32_t chunk = 0; chunk < args.k; chunk += CHUNK) {
        x.template store<X_STRIDE>(x_tile);
        w.template store<W_STRIDE>(w_tile);
        __syncthreads();
        const uint32_t chunk_end = min(chunk + CHUNK, args.k);
        if (chunk_end < args.k) load(chunk_end);

        for (uint32_t k = chunk; k < chunk_end;) {
            if (k >= run_end) {
                run = k;
                run_end = min(min((k / args.x_scale_run + 1) * args.x_scale_run,
                                  (k / args.weight_scale_run + 1) * args.weight_scale_run),
                              min((k / LONGEST_SUM + 1) * LONGEST_SUM, args.k));
            }
            const uint32_t end = min(run_end, chunk_end);
#pragma unroll 4
            for (; k < end; k++) {
                float a[EACH_ROWS], b[EACH_COLS];
#pragma unroll
                for (uint32_t i = 0; i < EACH_ROWS; i++) a[i] = x_tile[(k - chunk) * X_STRIDE + my_row + i];
#pragma unroll
                for (uint32_t j = 0; j < EACH_COLS; j++) b[j] = w_tile[(k - chunk) * W_STRIDE + my_col + j];
#pragma unroll
                for (uint32_t i = 0; i < EACH_ROWS; i++) {
#pragma unroll
                    for (uint32_t j = 0; j < EACH_COLS; j++) sums[i][j] = fmaf(a[i], b[j], sums[i][j]);
                }
            }
            if (k < run_end) break; // the sum goes on in the next chunk
            // Those past the end are not stored: any scale will do.
            float x_scales[EACH_ROWS];
#pragma unroll
            for (uint32_t i = 0; i < EACH_ROWS; i++) {
                x_scales[i] = args.x_scales ? x_scale(args, min(row + my_row + i, args.m - 1), run) : 1.0f;
            }
#pragma unroll
            for (uint32_t j = 0; j < EACH_COLS; j++) {
                const float scale = weight_scale(args, min(col + my_col + j, args.n - 1), run);
#pragma unroll
                for (uint32_t i = 0; i < EACH_ROWS; i++) {
                    total[i][j] = fmaf(sums[i][j], scale * x_scales[i], total[i][j]);
                    sums[i][j] = 0.0f;
                }
            }
        }
        __syncthreads();
    }

    // Through shared memory: neighbouring threads store neighbouring results, and the code to store one is there once.
    constexpr uint32_t STRIDE = COLS + 1;
    static_assert(ROWS * STRIDE <= CHUNK * X_STRIDE);
#pragma unroll
    for (uint32_t i = 0; i < EACH_ROWS; i++) {
#pragma unroll
        for (uint32_t j = 0; j < EACH_COLS; j++) x_tile[(my_row + i) * STRIDE + my_col + j] = total[i][j];
    }
    __syncthreads();
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < ROWS * COLS; i += THREADS) {
        const uint32_t token = row + i / COLS, feature = col + i % COLS;
        if (token < args.m && feature < args.n) {
            store_result(args, token, feature, x_tile[i / COLS * STRIDE + i % COLS]);
        }
    }
}

#define ANY(NAME, T)                                                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS) scaled_mm_any_##NAME(const ScaledMm args) {                  \
        any<T, 64, 64, 64, 4, 4>(args);                                                                                \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS) scaled_mm_any_##NAME##_few(const ScaledMm args) {            \
        any<T, 8, 32, 128, 1, 1>(args);                                                                                \
    }

ANY(e4m3, uint8_t)
ANY(bf16, __nv_bfloat16)
ANY(f16, __half)
ANY(f32, float)
