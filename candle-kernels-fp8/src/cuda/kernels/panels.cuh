// How the codes of a weight [n, k] lie in panels, so that a product reads them from one end to the other.
//
// Host twin: `Panels` in `pack.rs`. Eight rows are a panel. Along K it is cut into atoms of 128 codes, 1024 bytes
// [8][128] each, which follow each other: [n / 8][k / 128][8][128], with zeros where n or k end before. In row r of an
// atom, the piece of 16 bytes that should be the c-th is the (c ^ r)-th, as warpgroup products read tiles with a
// 128-byte swizzle.
#pragma once

#include <stdint.h>

constexpr uint32_t PANEL_ROWS = 8, ATOM_CODES = 128, ATOM_BYTES = PANEL_ROWS * ATOM_CODES;

// Bytes that a row of k codes takes.
__device__ __forceinline__ uint32_t panel_width(uint32_t k) { return (k + ATOM_CODES - 1) / ATOM_CODES * ATOM_CODES; }

// Where the 16 codes from k on, a multiple of 16, of a row of a panel lie in their atom.
__device__ __forceinline__ uint32_t place_in_atom(uint32_t row, uint32_t k) {
    const uint32_t r = row % PANEL_ROWS;
    return r * ATOM_CODES + (k % ATOM_CODES / 16 ^ r) * 16;
}
