// Rows of activations and where they go: as values, or quantized to E4M3. A group of threads has a row, and computes
// its values anew in each pass: what it reads again is in the cache.

// Host twin: `Mode` in `rows.rs`.
constant constexpr uint VALUES = 0;
constant constexpr uint TOKEN = 1;     // a scale for each row
constant constexpr uint NEIGHBORS = 2; // a scale for each `neighbors`
constant constexpr uint STATIC = 3;    // a scale that is given, and written down
constant constexpr uint TENSOR = 4;    // a scale for all rows, of the largest of `magnitudes` partial ones

// Host twin: `Output::words` in `rows.rs`.
struct Output {
    uint k;
    uint stride; // from row to row: elements of values, bytes of codes, of which those past k become zero
    uint mode;
    uint neighbors;
    float scale; // STATIC
    uint magnitudes;
};

// Magnitudes are compared as integers, as which NaN is above infinity.
inline uint magnitude_of(float value) { return as_type<uint>(value) & 0x7fffffff; }

// amax / 448, 1/448 for zeros, never subnormal.
inline float scale_of(uint amax) {
    const float scale = (amax == 0 ? 1.0f : as_type<float>(amax)) / 448.0f;
    return amax < 0x04e00000 && amax != 0 ? as_type<float>(MIN_NORMAL_BITS) : scale;
}

// The largest value of any thread of the group; `exchange` is LANES long, and free again behind the next barrier.
inline uint max_of_group(uint value, threadgroup uint* exchange, uint threads, uint lane, uint simd) {
    value = simd_max(value);
    if (lane == 0) exchange[simd] = value;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    return simd_max(lane < threads / LANES ? exchange[lane] : 0);
}

// As `max_of_group`, the sum.
inline float sum_of_group(float value, threadgroup float* exchange, uint threads, uint lane, uint simd) {
    value = simd_sum(value);
    if (lane == 0) exchange[simd] = value;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    return simd_sum(lane < threads / LANES ? exchange[lane] : 0.0f);
}

// Writes a row, whose values `values(i)` gives. `scales`: for TOKEN and NEIGHBORS what they are written to, one for
// each row or `neighbors`, for STATIC a single one; for TENSOR the partial magnitudes, behind which the scale goes.
template <typename T, typename Values>
inline void finish(constant Output& out, device uchar* to, device float* scales, Values values, uint row,
                   uint thread_index, uint threads, uint lane, uint simd, threadgroup uint* exchange) {
    if (out.mode == VALUES) {
        device T* const results = (device T*)to + ulong(row) * out.stride;
        for (uint i = thread_index; i < out.k; i += threads) results[i] = from_f32<T>(values(i));
        return;
    }
    device e4m3* const codes = (device e4m3*)to + ulong(row) * out.stride;
    for (uint i = out.k + thread_index; i < out.stride; i += threads) codes[i] = e4m3{0};
    if (out.mode == NEIGHBORS) {
        const uint runs = (out.k + out.neighbors - 1) / out.neighbors;
        for (uint run = simd; run < runs; run += threads / LANES) {
            const uint start = run * out.neighbors, end = min(start + out.neighbors, out.k);
            uint amax = 0;
            for (uint i = start + lane; i < end; i += LANES) amax = max(amax, magnitude_of(values(i)));
            const float scale = scale_of(simd_max(amax));
            if (lane == 0) scales[ulong(row) * runs + run] = scale;
            for (uint i = start + lane; i < end; i += LANES) codes[i] = from_f32<e4m3>(quotient(values(i), scale));
        }
        return;
    }
    float scale = out.scale;
    if (out.mode != STATIC) {
        uint amax = 0;
        if (out.mode == TOKEN) {
            for (uint i = thread_index; i < out.k; i += threads) amax = max(amax, magnitude_of(values(i)));
        } else {
            for (uint i = thread_index; i < out.magnitudes; i += threads) amax = max(amax, magnitude_of(scales[i]));
        }
        scale = scale_of(max_of_group(amax, exchange, threads, lane, simd));
        if (thread_index == 0 && out.mode == TOKEN) scales[row] = scale;
        if (thread_index == 0 && out.mode == TENSOR && row == 0) scales[out.magnitudes] = scale;
    } else if (thread_index == 0 && row == 0) {
        scales[0] = scale;
    }
    for (uint i = thread_index; i < out.k; i += threads) codes[i] = from_f32<e4m3>(quotient(values(i), scale));
}
