// Hopper's own instructions: barriers in shared memory, bulk tensor copies, warpgroup products.
#pragma once

#include <cuda.h>

#include "scaled_mm.cuh"
#include "shared.cuh"

// Dynamic shared memory from the first multiple of 1024 bytes on, where tiles with a swizzle have to lie.
template <typename T>
__device__ __forceinline__ T& aligned_shared() {
    extern __shared__ uint8_t memory[];
    // An offset rather than another address: the compiler goes on knowing that this is shared memory.
    return *reinterpret_cast<T*>(memory + (1024 - shared_address(memory) % 1024) % 1024);
}

// Has the L2 cache fetch a line.
__device__ __forceinline__ void prefetch_line(const void* line) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(line));
}

// --- Barriers in shared memory ---

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

// Makes initialized barriers visible to the copy engine and to the other blocks of the cluster.
__device__ __forceinline__ void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives at the barrier of the same place in another block of the cluster. Orders nothing but the arrivals themselves: a
// release to the cluster would flush all that this thread wrote, and a barrier's users here only read what copies wrote.
__device__ __forceinline__ void barrier_arrive_at(uint32_t barrier, uint32_t block) {
    asm volatile("{ .reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1;"
                 " mbarrier.arrive.shared::cluster.b64 _, [remote]; }" ::"r"(barrier),
                 "r"(block)
                 : "memory");
}

// How many of a warp's lanes arrive when all have written or read: one, after `__syncwarp`. The racecheck of
// compute-sanitizer goes by what a thread that arrives did itself, so that it is built for with every lane's arrival.
#ifdef EVERY_LANE_ARRIVES
constexpr uint32_t ARRIVALS = 32;
#else
constexpr uint32_t ARRIVALS = 1;
#endif

// By a warp; so is the next, which arrives at the barriers of that place in `BLOCKS` blocks of the cluster.
__device__ __forceinline__ void warp_arrive(uint32_t barrier) {
    if (threadIdx.x % 32 < ARRIVALS) barrier_arrive(barrier);
}

template <uint32_t BLOCKS>
__device__ __forceinline__ void warp_arrive_at_all(uint32_t barrier) {
    if constexpr (ARRIVALS == 1) {
        if (threadIdx.x % 32 < BLOCKS) barrier_arrive_at(barrier, threadIdx.x % 32);
    } else {
        for (uint32_t block = 0; block < BLOCKS; block++) barrier_arrive_at(barrier, block);
    }
}

// Arrives, and has the phase wait for so many bytes of copies.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
    asm volatile("{ .reg .pred done; again:"
                 " mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;"
                 " @!done bra again; }" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
}

// Arrives when all that this thread has copied asynchronously so far is there.
__device__ __forceinline__ void barrier_arrive_after_copies(uint32_t barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// By an address that is no pointer.
__device__ __forceinline__ float load_shared(uint32_t from) {
    float value;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(from) : "memory");
    return value;
}

__device__ __forceinline__ float2 load_shared2(uint32_t from) {
    float2 value;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(value.x), "=f"(value.y) : "r"(from) : "memory");
    return value;
}

__device__ __forceinline__ void store_shared(uint32_t to, float value) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(value) : "memory");
}

// A barrier of `threads` threads of the block; 0 is that of __syncthreads.
__device__ __forceinline__ void named_barrier(uint32_t id, uint32_t threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Arrives without waiting for the others.
__device__ __forceinline__ void named_barrier_arrive(uint32_t id, uint32_t threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Whether this is the one thread of a warp, all of which ask. The compiler then knows that it is one: where it only sees a
// condition on the lane, it puts a loop over lanes around each copy, which takes longer than the copy.
__device__ __forceinline__ bool elect_one() {
    uint32_t elected;
    asm volatile("{ .reg .pred elected; elect.sync _|elected, 0xffffffff; selp.u32 %0, 1, 0, elected; }"
                 : "=r"(elected));
    return elected;
}

__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ __forceinline__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The same for threads that have written nothing that other blocks read, apart from barriers that `barrier_init_fence`
// made visible: without the wait for all writes to memory that a release is.
__device__ __forceinline__ void cluster_barrier_relaxed() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// --- Bulk copies ---

// Copies a tile [rows, 128 bytes] from column `x`, row `y` on; what lies outside the tensor is zero.
__device__ __forceinline__ void copy_tile(uint32_t to, const CUtensorMap* from, uint32_t x, uint32_t y, uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                 ::"r"(to), "l"(from), "r"(x), "r"(y), "r"(barrier)
                 : "memory");
}

// The same into all blocks of the cluster that `blocks` has a bit for; each one's barrier counts the bytes.
__device__ __forceinline__ void copy_tile_to(uint32_t to, const CUtensorMap* from, uint32_t x, uint32_t y,
                                             uint32_t barrier, uint16_t blocks) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
                 " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to), "l"(from), "r"(x), "r"(y), "r"(barrier), "h"(blocks)
                 : "memory");
}

// Copies a tile of a tensor of three dimensions, from (x, y, z) on; what lies outside is zero.
__device__ __forceinline__ void copy_tile(uint32_t to, const CUtensorMap* from, uint32_t x, uint32_t y, uint32_t z,
                                          uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 " [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to), "l"(from), "r"(x), "r"(y), "r"(z), "r"(barrier)
                 : "memory");
}

// Copies a tile of the weight that is 128 codes deep, with a map for its layout. In shared memory, both layouts are the
// same: an atom is what a 128-byte swizzle makes of eight rows.
__device__ __forceinline__ void copy_weight_tile(const ScaledMm& args, uint32_t to, const CUtensorMap* from, uint32_t k,
                                                 uint32_t row, uint32_t barrier) {
    if (args.panels) {
        copy_tile(to, from, 0, k / ATOM_CODES, row / PANEL_ROWS, barrier);
    } else {
        copy_tile(to, from, k, row, barrier);
    }
}

// Copies bytes that follow each other: a multiple of 16, to and from such multiples.
__device__ __forceinline__ void copy_bytes(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// --- Warpgroup products: D[64, N] = A[64, 32] * B[N, 32]^T, codes in shared memory, sums in registers ---

// A tile [rows, 128 bytes] in shared memory, as bulk copies with a 128-byte swizzle write it.
//
// The layout of a factor whose rows run along K, with this swizzle: row r, byte b is at
//     address + r / 8 * group + r % 8 * 128 + b, with bits 4 to 6 of that xor its bits 7 to 9.
// So eight rows are one piece of 1024 bytes, aligned to as much, whose bits 7 to 9 say r % 8: 16 bytes c of row r lie
// at r % 8 * 128 + (c ^ r % 8) * 16 in it, which is an atom of a weight in panels. The pieces may lie anywhere, `group`
// bytes apart. A descriptor holds, in units of 16 bytes: the address in bits 0 to 13; the distance between columns in
// 16 to 29, which this swizzle does not use; `group` in 32 to 45; in 49 to 51 where in its 1024 bytes a piece starts,
// 0; the swizzle in 62 to 63. Adding 2 moves the tile by 32 bytes along its rows: bits 7 to 9 stay, so the swizzle goes
// on to fit.
__device__ __forceinline__ uint64_t tile_descriptor(uint32_t address, uint32_t group = 1024) {
    constexpr uint64_t SWIZZLE_128 = 1;
    return uint64_t(address & 0x3ffff) >> 4 | 1ull << 16 | uint64_t(group >> 4) << 32 | SWIZZLE_128 << 62;
}

// Orders what was done to the registers of sums before products that use them.
__device__ __forceinline__ void products_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most so many committed groups are unfinished.
template <int PENDING>
__device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Stores four matrices [8, 8] of 16-bit values: word w of lane 4 g + t is columns 2 t and 2 t + 1 of row g of matrix w; lane
// 8 w + r says where row r of matrix w goes, 16 bytes.
__device__ __forceinline__ void store_matrices(void* row, const uint32_t (&words)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
                 "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
}

// Keeps the compiler from moving uses of sums across the place.
template <int COUNT>
__device__ __forceinline__ void hold(float (&sums)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(sums[i])::"memory");
}

// `add`: whether to add to what `d` holds. Lane 4 g + t of warp w holds columns 8 j + 2 t and 8 j + 2 t + 1, of row
// 16 w + g in d[4 j] and d[4 j + 1], of row 16 w + g + 8 in d[4 j + 2] and d[4 j + 3].
template <int N>
__device__ __forceinline__ void multiply(float (&d)[N / 2], uint64_t a, uint64_t b, bool add);

template <>
__device__ __forceinline__ void multiply<8>(float (&d)[4], uint64_t a, uint64_t b, bool add) {
    asm volatile(
        "{ .reg .pred add; setp.ne.b32 add, %6, 0;"
        " wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 "
        "{%0, %1, %2, %3}, "
        "%4, %5, add, 1, 1; }"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "l"(a), "l"(b), "r"(int(add)));
}

template <>
__device__ __forceinline__ void multiply<16>(float (&d)[8], uint64_t a, uint64_t b, bool add) {
    asm volatile(
        "{ .reg .pred add; setp.ne.b32 add, %10, 0;"
        " wgmma.mma_async.sync.aligned.m64n16k32.f32.e4m3.e4m3 "
        "{%0, %1, %2, %3, %4, %5, %6, %7}, "
        "%8, %9, add, 1, 1; }"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
        : "l"(a), "l"(b), "r"(int(add)));
}

template <>
__device__ __forceinline__ void multiply<32>(float (&d)[16], uint64_t a, uint64_t b, bool add) {
    asm volatile(
        "{ .reg .pred add; setp.ne.b32 add, %18, 0;"
        " wgmma.mma_async.sync.aligned.m64n32k32.f32.e4m3.e4m3 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
        "%16, %17, add, 1, 1; }"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
          "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
        : "l"(a), "l"(b), "r"(int(add)));
}

template <>
__device__ __forceinline__ void multiply<64>(float (&d)[32], uint64_t a, uint64_t b, bool add) {
    asm volatile(
        "{ .reg .pred add; setp.ne.b32 add, %34, 0;"
        " wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
        "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "%32, %33, add, 1, 1; }"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
          "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
          "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
          "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
        : "l"(a), "l"(b), "r"(int(add)));
}

template <>
__device__ __forceinline__ void multiply<96>(float (&d)[48], uint64_t a, uint64_t b, bool add) {
    asm volatile(
        "{ .reg .pred add; setp.ne.b32 add, %50, 0;"
        " wgmma.mma_async.sync.aligned.m64n96k32.f32.e4m3.e4m3 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
        "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "
        "%42, %43, %44, %45, %46, %47}, "
        "%48, %49, add, 1, 1; }"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
          "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
          "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
          "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]),
          "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]),
          "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
        : "l"(a), "l"(b), "r"(int(add)));
}

template <>
__device__ __forceinline__ void multiply<128>(float (&d)[64], uint64_t a, uint64_t b, bool add) {
    asm volatile(
        "{ .reg .pred add; setp.ne.b32 add, %66, 0;"
        " wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
        "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "
        "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "
        "%62, %63}, "
        "%64, %65, add, 1, 1; }"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
          "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
          "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
          "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]),
          "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]),
          "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),
          "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]),
          "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
        : "l"(a), "l"(b), "r"(int(add)));
}

template <>
__device__ __forceinline__ void multiply<192>(float (&d)[96], uint64_t a, uint64_t b, bool add) {
    asm volatile(
        "{ .reg .pred add; setp.ne.b32 add, %98, 0;"
        " wgmma.mma_async.sync.aligned.m64n192k32.f32.e4m3.e4m3 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
        "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "
        "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "
        "%62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, "
        "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}, "
        "%96, %97, add, 1, 1; }"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
          "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
          "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
          "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]),
          "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]),
          "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),
          "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]),
          "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]), "+f"(d[64]),
          "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]), "+f"(d[72]),
          "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), "+f"(d[80]),
          "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), "+f"(d[88]),
          "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
        : "l"(a), "l"(b), "r"(int(add)));
}
