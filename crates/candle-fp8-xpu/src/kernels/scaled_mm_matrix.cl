// Products of many rows, by the matrix units (DPAS), which multiply halves: codes are exact as BF16 and as F16, and
// become those in registers. Sums are f32.
//
// A subgroup computes a tile of TILES times 8 tokens by LANES features. In each step of 16 along K a lane has 16
// codes of one feature, which are eight pairs as the unit takes them.

#define STEP 16
#define TOKENS (8 * TILES)

// One activation for each lane, or a pair where a subgroup has only 8.
#if LANES == 8
typedef int Part;
typedef int8 Parts;
#else
typedef short Part;
typedef short8 Parts;
#endif

// A code as one half of the unit's type.
uint half_of(uint code) {
#if X == F16
    const uint bits = as_uint(decode(code));
    const uint magnitude = bits & MAGNITUDE;
    // From bias 127 to 15: no code is subnormal as F16.
    const uint rebiased = magnitude == 0 ? 0 : (magnitude >> 13) - (112 << 10);
    return bits >> 16 & 0x8000 | (magnitude > INFINITE ? 0x7e00 : rebiased);
#else
    return as_uint(decode(code)) >> 16;
#endif
}

uint pair_of(uint codes) { return half_of(codes & 0xff) | half_of(codes >> 8 & 0xff) << 16; }

#if EMULATED
float widen(uint bits) {
#if X == F16
    const ushort half_bits = (ushort)bits;
    return vload_half(0, (const half*)&half_bits);
#else
    return widen_bf16(bits);
#endif
}

// What the unit does, for devices that have none.
float8 multiply(Parts a, int8 b, float8 sums) {
    Part rows[8];
    int pairs[8];
    float results[8];
    vstore8(a, 0, rows);
    vstore8(b, 0, pairs);
    vstore8(sums, 0, results);
    for (uint k = 0; k < STEP; k++) {
        const float w = widen((uint)pairs[k / 2] >> k % 2 * 16 & 0xffff);
        for (uint i = 0; i < 8; i++) {
            const uint bits = (uint)(int)sub_group_broadcast((int)rows[i], k * LANES / STEP);
            results[i] = fma(widen((LANES == 8 && k % 2 ? bits >> 16 : bits) & 0xffff), w, results[i]);
        }
    }
    return vload8(0, results);
}
#elif X == F16
#define multiply intel_sub_group_f16_f16_matrix_mad_k16
#else
#define multiply intel_sub_group_bf16_bf16_matrix_mad_k16
#endif

// A lane's part of 16 neighbours of a row.
Part load_part(const __global Element* from, uint lane) {
#if X == E4M3 && LANES == 8
    return (int)pair_of(((const __global ushort*)from)[lane]);
#elif X == E4M3
    return (short)half_of(from[lane]);
#elif LANES == 8
    return ((const __global int*)from)[lane];
#else
    return ((const __global short*)from)[lane];
#endif
}

__attribute__((intel_reqd_sub_group_size(LANES))) __kernel void scaled_mm_matrix(ARGUMENTS) {
    const uint first_col = (get_group_id(0) * get_num_sub_groups() + get_sub_group_id()) * LANES;
    const uint first_row = get_group_id(1) * TOKENS, lane = get_sub_group_local_id();
    if (first_col >= args.n) return;
    // What is past the end is computed again, and not stored.
    const uint col = min(first_col + lane, args.n - 1);
    const __global uchar* codes = weight + (size_t)col * args.weight_stride;

    float8 sums[TILES];
#if RUNS
    float8 totals[TILES];
#endif
    for (uint t = 0; t < TILES; t++) {
        sums[t] = 0.0f;
#if RUNS
        totals[t] = 0.0f;
#endif
    }
    uint end = run_end(args, 0);
    for (uint k = 0; k < args.k; k += STEP) {
        const uint4 words = *(const __global uint4*)(codes + k);
        const int8 b = (int8)(pair_of(words.x), pair_of(words.x >> 16), pair_of(words.y), pair_of(words.y >> 16),
                              pair_of(words.z), pair_of(words.z >> 16), pair_of(words.w), pair_of(words.w >> 16));
        for (uint t = 0; t < TILES; t++) {
            Part parts[8];
            for (uint i = 0; i < 8; i++) {
                const uint row = min(first_row + t * 8 + i, args.m - 1);
                parts[i] = load_part(x + (size_t)row * args.x_stride + k, lane);
            }
            sums[t] = multiply(vload8(0, parts), b, sums[t]);
        }
#if RUNS
        if (k + STEP >= end) {
            const float w_scale = weight_scale_at(weight_scales, args, col, k);
            for (uint t = 0; t < TILES; t++) {
                float scales[8];
                for (uint i = 0; i < 8; i++) {
                    scales[i] = w_scale * x_scale_at(x_scales, args, min(first_row + t * 8 + i, args.m - 1), k);
                }
                totals[t] = fma(sums[t], vload8(0, scales), totals[t]);
                sums[t] = 0.0f;
            }
            if (k + STEP < args.k) end = run_end(args, k + STEP);
        }
#endif
    }
    for (uint t = 0; t < TILES; t++) {
        float results[8];
#if RUNS
        vstore8(totals[t], 0, results);
#else
        vstore8(sums[t], 0, results);
#endif
        for (uint i = 0; i < 8; i++) {
            const uint row = first_row + t * 8 + i;
            if (row >= args.m || first_col + lane >= args.n) continue;
#if !RUNS
            results[i] *= x_scale_at(x_scales, args, row, 0) * weight_scale_at(weight_scales, args, col, 0);
#endif
            store_result(bias, out, args, row, col, results[i]);
        }
    }
}
