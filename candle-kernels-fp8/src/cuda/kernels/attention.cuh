// Causal attention over a cache of keys and values: what its kernels share.
#pragma once

#include "common.cuh"

// Host twin: `Params` in `attention/params.rs`. A row is a query head at a position; the rows of a head of keys are its
// query heads at the first position, then at the next, so that they share what is read.
struct Attention {
    const void* q;             // [B, L, Hq, D]
    const void* k;             // [B, Hkv, T, D]
    const void* v;             // [B, Hkv, T, D]
    void* out;                 // [B, L, Hq, D]
    const uint32_t* positions; // null or [B]: of a sequence's first query
    float* partial;            // of parts of the keys: see `attention_few_rows.cu`
    uint32_t* counters;        // zeros, and zeros again when the kernel is done
    uint64_t q_stride, out_stride;                 // elements from token to token
    uint64_t k_batch, k_head, v_batch, v_head;     // elements from sequence to sequence, and from head to head
    uint32_t position;                             // of the first query, without `positions`
    uint32_t capacity;                             // keys that a head has room for, at least L
    uint32_t batch, queries, kv_heads, group, dim; // B; L; Hkv; Hq / Hkv; D
    uint32_t window;                               // keys that a query sees at most
    uint32_t splits;                               // parts of the keys, at most
    float scale;                                   // of scores, in powers of two: log2(e) times that of the definition

    // Whatever `positions` holds, no key outside of the cache is read.
    __device__ __forceinline__ uint32_t position_of(uint32_t sequence) const {
        return min(positions ? positions[sequence] : position, capacity - queries);
    }
    // The keys that a row sees: from `begin` to before `end`.
    __device__ __forceinline__ uint32_t end(uint32_t position, uint32_t row) const {
        return position + row / group + 1;
    }
    __device__ __forceinline__ uint32_t begin(uint32_t position, uint32_t row) const {
        const uint32_t last = end(position, row);
        return last > window ? last - window : 0;
    }
    // Where a row is in `q` and `out`, of tokens so many elements apart.
    __device__ __forceinline__ uint64_t at(uint32_t sequence, uint32_t kv_head, uint32_t row, uint64_t stride) const {
        return (uint64_t(sequence) * queries + row / group) * stride + (kv_head * group + row % group) * dim;
    }
    template <typename T>
    __device__ __forceinline__ const T* keys(uint32_t sequence, uint32_t kv_head) const {
        return static_cast<const T*>(k) + sequence * k_batch + kv_head * k_head;
    }
    template <typename T>
    __device__ __forceinline__ const T* values(uint32_t sequence, uint32_t kv_head) const {
        return static_cast<const T*>(v) + sequence * v_batch + kv_head * v_head;
    }
};

// What scores are compared with before they become weights: the largest, or 0 where there is none.
__device__ __forceinline__ float reference(float most) { return most == -INFINITY ? 0.0f : most; }
