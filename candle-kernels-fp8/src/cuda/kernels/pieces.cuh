// Sixteen bytes of a row, wherever it starts and ends.
#pragma once

#include <stdint.h>

constexpr uint32_t PIECE_BYTES = 16;

// How many of the bytes from `at` on, at most 16, come before `end`.
__device__ __forceinline__ uint32_t bytes_left(uint32_t at, uint32_t end) {
    return at < end ? min(end - at, PIECE_BYTES) : 0;
}

// The first `count` bytes from an address on, of any alignment, then zeros. Nothing else is read.
__device__ __forceinline__ uint4 load_bytes(const uint8_t* from, uint32_t count) {
    if (count == PIECE_BYTES && reinterpret_cast<uintptr_t>(from) % PIECE_BYTES == 0) {
        return *reinterpret_cast<const uint4*>(from);
    }
    uint64_t low = 0, high = 0;
    // The last byte first; all move up for each. Rare, so that short code is worth more than speed.
#pragma unroll 1
    for (uint32_t i = count; i-- > 0;) {
        high = high << 8 | low >> 56;
        low = low << 8 | from[i];
    }
    return make_uint4(uint32_t(low), uint32_t(low >> 32), uint32_t(high), uint32_t(high >> 32));
}

// Writes the first `count` bytes, and nothing else, to an address of any alignment.
__device__ __forceinline__ void store_bytes(uint8_t* to, const uint4& bytes, uint32_t count) {
    if (count == PIECE_BYTES && reinterpret_cast<uintptr_t>(to) % PIECE_BYTES == 0) {
        *reinterpret_cast<uint4*>(to) = bytes;
        return;
    }
    uint64_t low = uint64_t(bytes.y) << 32 | bytes.x, high = uint64_t(bytes.w) << 32 | bytes.z;
#pragma unroll 1
    for (uint32_t i = 0; i < count; i++) {
        to[i] = uint8_t(low);
        low = low >> 8 | high << 56;
        high >>= 8;
    }
}
