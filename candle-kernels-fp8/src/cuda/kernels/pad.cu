// Rows of bytes, moved apart so that they start at multiples of 16 bytes.

#include "common.cuh"

// A block copies a row of k bytes and writes zeros behind it, up to the next one.
extern "C" __global__ void __launch_bounds__(256) pad_rows(const uint8_t* from, uint64_t from_stride, uint8_t* to,
                                                           uint64_t to_stride, uint32_t k) {
    launch_dependents();
    wait_for_inputs();
    from += blockIdx.x * from_stride;
    to += blockIdx.x * to_stride;
    const bool aligned = reinterpret_cast<uintptr_t>(from) % 16 == 0;
    for (uint64_t i = threadIdx.x * 16; i < to_stride; i += blockDim.x * 16) {
        uint4 piece = make_uint4(0, 0, 0, 0);
        if (aligned && i + 16 <= k) {
            piece = *reinterpret_cast<const uint4*>(from + i);
        } else {
            uint32_t words[4] = {};
#pragma unroll
            for (uint32_t j = 0; j < 16; j++) {
                if (i + j < k) words[j / 4] |= uint32_t(from[i + j]) << j % 4 * 8;
            }
            piece = make_uint4(words[0], words[1], words[2], words[3]);
        }
        *reinterpret_cast<uint4*>(to + i) = piece;
    }
}
