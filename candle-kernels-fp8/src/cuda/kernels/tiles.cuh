// Tiles of rows in shared memory, and how they get there on every card.
#pragma once

#include "shared.cuh"

__device__ __forceinline__ void read16(uint32_t (&words)[4], const uint8_t* from) {
    const uint4 read = *reinterpret_cast<const uint4*>(from);
    words[0] = read.x, words[1] = read.y, words[2] = read.z, words[3] = read.w;
}

// Reads four matrices of 8 rows of 16 bytes: lane 8 w + r says where row r of matrix w is; word w of lane 4 g + t is
// the t-th of row g of matrix w.
__device__ __forceinline__ void read_matrices(uint32_t (&words)[4], const uint8_t* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// How rows of 16-byte pieces lie in shared memory: pieces change places in another way in each of CYCLE rows.
template <uint32_t ROW_BYTES, uint32_t CYCLE>
struct Tile {
    static constexpr uint32_t PIECES = ROW_BYTES / 16;

    __device__ static __forceinline__ uint32_t place(uint32_t row, uint32_t piece) {
        return row * ROW_BYTES + (piece ^ row % CYCLE) * 16;
    }

    // The first row that a thread copies of a tile, and where in each of its rows it starts, in bytes.
    __device__ static __forceinline__ uint32_t own_row() { return threadIdx.x / PIECES; }
    __device__ static __forceinline__ uint32_t own_byte() { return threadIdx.x % PIECES * 16; }

    // A thread's share of copying ROWS rows: `from` is its piece of its first row, and rows that are a multiple of
    // eight apart are so many times `stride` bytes apart. Zeros for rows past the first `rows`, and for what is past
    // the first `bytes` of each.
    template <uint32_t ROWS, uint32_t THREADS>
    __device__ static __forceinline__ void copy(uint32_t to, const uint8_t* from, uint64_t stride, uint32_t rows,
                                                uint32_t bytes) {
        constexpr uint32_t AT_ONCE = THREADS / PIECES;
        static_assert(ROWS % AT_ONCE == 0 && AT_ONCE % CYCLE == 0 && AT_ONCE % 8 == 0);
        const int32_t left = rows - own_row();
        to += place(own_row(), threadIdx.x % PIECES);
        // Parts of pieces, where a row ends in one, cost more instructions.
        if (bytes < ROW_BYTES && bytes % 16) {
            const uint32_t present = min(max(int32_t(bytes - own_byte()), 0), 16);
#pragma unroll 1
            for (int32_t i = 0; i < int32_t(ROWS); i += AT_ONCE) {
                copy16(to + i * ROW_BYTES, from, i < left ? present : 0);
                from += AT_ONCE * stride;
            }
            return;
        }
        const bool present = own_byte() < bytes;
#pragma unroll
        for (int32_t i = 0; i < int32_t(ROWS); i += AT_ONCE) {
            copy16(to + i * ROW_BYTES, from, present && i < left ? 16 : 0);
            from += AT_ONCE * stride;
        }
    }
};
