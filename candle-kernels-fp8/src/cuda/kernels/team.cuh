// The threads that share a row: a warp, a block, or the blocks of a cluster.
#pragma once

#include "primitives.cuh"

constexpr uint32_t MOST_WARPS = 256; // of a team: 32 of each of 8 blocks

// What a team's threads tell each other. Each part is used once in a kernel, so that nothing is overwritten too soon.
struct Exchange {
    uint32_t slots[MOST_WARPS]; // of each warp
    uint64_t received;          // barrier, if values come from other blocks
};

// How a kernel's threads are shared out among rows. Host twin: `Shape` in `rows.rs`.
struct Shape {
    uint32_t threads; // of a block that share a row: 32, so that a block has several rows, or the whole block
    uint32_t shift;   // log2 of the blocks that share a row
    uint32_t cluster; // blocks of a cluster: 1, or all that share a row
};

struct Team {
    uint32_t row;
    uint32_t thread;  // in its block's part of the team
    uint32_t threads; // of each block's part
    uint32_t part;    // the block's
    uint32_t shift;
    uint32_t blocks; // that exchange values
    bool all_ready;  // whether all those blocks are known to be ready to receive
    Exchange* exchanges; // for the largest value, and for the sum

    __device__ __forceinline__ explicit Team(const Shape& shape)
        : threads(shape.threads), part(blockIdx.x & ((1u << shape.shift) - 1)), shift(shape.shift),
          blocks(shape.cluster), all_ready(false) {
        __shared__ Exchange memory[2];
        exchanges = memory;
        row = blockIdx.x >> shape.shift, thread = threadIdx.x;
        if (threads == 32) {
            row = row * (blockDim.x / 32) + threadIdx.x / 32;
            thread = threadIdx.x % 32;
        }
        if (blocks > 1) {
            if (thread == 0) {
                announce(&exchanges[0].received, threads / 32 * blocks * 4);
                announce(&exchanges[1].received, threads / 32 * blocks * 4);
            }
            cluster_arrive();
        }
    }

    // Of a row that is dealt out in pieces, one to each thread in turn: a thread's first, and the way to its next.
    __device__ __forceinline__ uint32_t first() const { return part * threads + thread; }
    __device__ __forceinline__ uint32_t step() const { return threads << shift; }

    // The largest value of any thread. To be called by all, and once in a kernel.
    __device__ __forceinline__ uint32_t max(uint32_t value) {
        value = __reduce_max_sync(~0u, value);
        const uint32_t count = threads / 32 * blocks;
        if (count == 1) return value;
        const uint32_t* const slots = tell(exchanges[0], value);
        value = 0;
#pragma unroll 1
        for (uint32_t i = thread % 32; i < count; i += 32) value = value > slots[i] ? value : slots[i];
        return __reduce_max_sync(~0u, value);
    }

    // The sum of all threads' values, added in an order that depends on the shape alone. To be called as `max`.
    __device__ __forceinline__ float sum(float value) {
#pragma unroll
        for (uint32_t lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(~0u, value, lanes);
        const uint32_t count = threads / 32 * blocks;
        if (count == 1) return value;
        const uint32_t* const slots = tell(exchanges[1], __float_as_uint(value));
        // As many lanes as there are slots, up to a power of two, add them up; the others do the same once more.
        const uint32_t sharers = count > 32 ? 32 : 1u << (32 - __clz(count - 1));
        value = 0.0f;
#pragma unroll 1
        for (uint32_t i = thread & (sharers - 1); i < count; i += 32) value += __uint_as_float(slots[i]);
        for (uint32_t lanes = 1; lanes < sharers; lanes *= 2) value += __shfl_xor_sync(~0u, value, lanes);
        return value;
    }

private:
    // Writes the value of each warp to its slot, in every block, and waits for those of the others.
    __device__ __forceinline__ const uint32_t* tell(Exchange& exchange, uint32_t value) {
        const uint32_t lane = thread % 32, warp = thread / 32;
        if (blocks == 1) {
            if (lane == 0) exchange.slots[warp] = value;
            __syncthreads();
            return exchange.slots;
        }
        if (!all_ready) cluster_wait();
        all_ready = true;
        if (lane < blocks) send(&exchange.slots[part * (threads / 32) + warp], &exchange.received, lane, value);
        receive(&exchange.received);
        return exchange.slots;
    }
};
