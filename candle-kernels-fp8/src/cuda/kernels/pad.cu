// Rows of bytes, moved apart so that they start at multiples of 16 bytes.

#include "common.cuh"
#include "pieces.cuh"

// A block copies a row of k bytes and writes zeros behind it, up to the next one.
extern "C" __global__ void __launch_bounds__(256) pad_rows(const uint8_t* from, uint64_t from_stride, uint8_t* to,
                                                           uint32_t to_stride, uint32_t k) {
    launch_dependents();
    wait_for_inputs();
    from += blockIdx.x * from_stride;
    to += uint64_t(blockIdx.x) * to_stride;
    for (uint32_t i = threadIdx.x * PIECE_BYTES; i < to_stride; i += blockDim.x * PIECE_BYTES) {
        *reinterpret_cast<uint4*>(to + i) = load_bytes(from + i, bytes_left(i, k));
    }
}
