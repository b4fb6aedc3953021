// Tiles of rows in shared memory, and how they get there on every card.
#pragma once

#include <stdint.h>

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes, or zeros if not `present`.
__device__ __forceinline__ void copy16(uint32_t to, const void* from, bool present) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(present ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void copy4(uint32_t to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most so many committed groups of this thread's copies are unfinished.
template <int PENDING>
__device__ __forceinline__ void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

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

    // A thread's share of copying ROWS rows from row `first`, byte `at` on; what is past `rows` or `end` becomes zero.
    template <uint32_t ROWS, uint32_t THREADS>
    __device__ static __forceinline__ void copy(uint32_t to, const uint8_t* from, uint64_t stride, uint32_t first,
                                                uint32_t rows, uint32_t at, uint32_t end) {
        constexpr uint32_t AT_ONCE = THREADS / PIECES;
        static_assert(ROWS % AT_ONCE == 0 && AT_ONCE % CYCLE == 0);
        const uint32_t row = threadIdx.x / PIECES, piece = threadIdx.x % PIECES;
        const int32_t left = at + piece * 16 < end ? int32_t(rows - first - row) : 0;
        from += (first + row) * stride + at + piece * 16;
        to += place(row, piece);
#pragma unroll
        for (int32_t i = 0; i < int32_t(ROWS); i += AT_ONCE) {
            copy16(to + i * ROW_BYTES, from, i < left);
            from += AT_ONCE * stride;
        }
    }
};
