// The arguments of a product of activations [m, k] with the transpose of a weight [n, k].
#pragma once

#include "common.cuh"
#include "panels.cuh"

// Host twin: `Params` in `scaled_mm/params.rs`. Everything but a weight in panels is row-major; rows start at multiples
// of 16 bytes.
struct ScaledMm {
    const void* x;              // [m, k], codes or values of x_float
    const float* x_scales;      // null for values; scale of (row, k): [row * x_scale_row + k / x_scale_run]
    const uint8_t* weight;      // [n, k], codes
    const float* weight_scales; // scale of (row, k): [row / weight_scale_rows * weight_scale_row + k / weight_scale_run]
    const void* bias;           // null or [n], of bias_float
    void* out;                  // [m, n], dense, of out_float
    uint32_t m, n, k;
    uint32_t x_stride;      // elements from row to row
    uint32_t weight_stride; // bytes from row to row; in panels, those that a row takes
    uint32_t panels;        // whether the weight lies in panels, not in rows
    uint32_t x_scale_row, x_scale_run;
    uint32_t weight_scale_rows, weight_scale_row, weight_scale_run;
    Float x_float, bias_float, out_float;
};

// Where the 16 codes of the weight from k on, a multiple of 16, of a row are. In both layouts, eight rows further on
// they are 8 `weight_stride` bytes further on, and 128 codes further on, `weight_step` bytes.
__device__ __forceinline__ const uint8_t* weight_piece(const ScaledMm& args, uint32_t row, uint32_t k) {
    if (!args.panels) return args.weight + uint64_t(row) * args.weight_stride + k;
    const uint64_t panel = uint64_t(row / PANEL_ROWS) * (PANEL_ROWS * uint64_t(args.weight_stride));
    return args.weight + panel + uint64_t(k / ATOM_CODES) * ATOM_BYTES + place_in_atom(row, k);
}

__device__ __forceinline__ uint32_t weight_step(const ScaledMm& args) { return args.panels ? ATOM_BYTES : ATOM_CODES; }

// From a piece in the first half of 128 codes of a row to the one 64 codes further on, in bytes. In the last four rows
// of a panel, the halves have changed places.
__device__ __forceinline__ int32_t weight_half_step(const ScaledMm& args, uint32_t row) {
    return args.panels && row % PANEL_ROWS >= 4 ? -64 : 64;
}

// a / b, without a division where runs and blocks are as they mostly are.
__device__ __forceinline__ uint32_t quotient(uint32_t a, uint32_t b) {
    return a < b ? 0 : b == 1 ? a : b == 128 ? a / 128 : a / b;
}

__device__ __forceinline__ float x_scale(const ScaledMm& args, uint32_t row, uint32_t k) {
    return args.x_scales[uint64_t(row) * args.x_scale_row + quotient(k, args.x_scale_run)];
}

__device__ __forceinline__ float weight_scale(const ScaledMm& args, uint32_t row, uint32_t k) {
    const uint64_t start = uint64_t(quotient(row, args.weight_scale_rows)) * args.weight_scale_row;
    return args.weight_scales[start + quotient(k, args.weight_scale_run)];
}

// Stores one result: the bias is added in f32.
__device__ __forceinline__ void store_result(const ScaledMm& args, uint32_t row, uint32_t col, float value) {
    if (args.bias) value += load_float(args.bias, col, args.bias_float);
    store_float(args.out, uint64_t(row) * args.n + col, value, args.out_float);
}
