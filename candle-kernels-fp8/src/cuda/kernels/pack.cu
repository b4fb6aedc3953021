// Weights, moved from rows into panels and back.

#include "common.cuh"
#include "panels.cuh"
#include "pieces.cuh"

// A block moves up to EACH * AT_ONCE atoms of a panel, a thread one piece of 16 bytes of each AT_ONCE of them: on the
// side of the panels, a warp's pieces follow each other; on that of the rows, they are 128 bytes of each of four.
constexpr uint32_t THREADS = 256, PIECES = ATOM_BYTES / PIECE_BYTES, AT_ONCE = THREADS / PIECES, EACH = 4;

struct Place {
    uint32_t row, column; // of the weight, of the piece of atom 0
    uint32_t first, end;  // atoms of this thread, AT_ONCE apart
    uint64_t packed;      // of the piece of atom 0, in pieces

    __device__ __forceinline__ explicit Place(uint32_t k) {
        const uint32_t piece = threadIdx.x % PIECES, r = piece / 8, atoms = panel_width(k) / ATOM_CODES;
        row = blockIdx.x * PANEL_ROWS + r;
        column = (piece % 8 ^ r) * PIECE_BYTES;
        first = blockIdx.y * (EACH * AT_ONCE) + threadIdx.x / PIECES;
        end = atoms;
        packed = uint64_t(blockIdx.x) * atoms * PIECES + piece;
    }
};

// From rows `stride` bytes apart, of any alignment.
extern "C" __global__ void __launch_bounds__(THREADS) pack_weight(const uint8_t* from, uint64_t stride, uint4* to,
                                                                  uint32_t n, uint32_t k) {
    launch_dependents();
    wait_for_inputs();
    const Place place(k);
    const uint64_t row = place.row * stride;
    uint4 pieces[EACH];
#pragma unroll
    for (uint32_t i = 0; i < EACH; i++) {
        const uint32_t at = place.column + (place.first + i * AT_ONCE) * ATOM_CODES;
        pieces[i] = load_bytes(from + row + at, place.row < n ? bytes_left(at, k) : 0);
    }
#pragma unroll
    for (uint32_t i = 0; i < EACH; i++) {
        const uint32_t atom = place.first + i * AT_ONCE;
        if (atom < place.end) to[place.packed + uint64_t(atom) * PIECES] = pieces[i];
    }
}

// To rows `stride` bytes apart, of any alignment; what is between them stays.
extern "C" __global__ void __launch_bounds__(THREADS) unpack_weight(const uint4* from, uint8_t* to, uint64_t stride,
                                                                    uint32_t n, uint32_t k) {
    launch_dependents();
    wait_for_inputs();
    const Place place(k);
    if (place.row >= n) return;
    uint4 pieces[EACH];
#pragma unroll
    for (uint32_t i = 0; i < EACH; i++) {
        const uint32_t atom = place.first + i * AT_ONCE;
        if (atom < place.end) pieces[i] = from[place.packed + uint64_t(atom) * PIECES];
    }
#pragma unroll
    for (uint32_t i = 0; i < EACH; i++) {
        const uint32_t at = place.column + (place.first + i * AT_ONCE) * ATOM_CODES;
        store_bytes(to + place.row * stride + at, pieces[i], bytes_left(at, k));
    }
}
