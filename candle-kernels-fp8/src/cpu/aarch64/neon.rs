//! Inner loops for NEON, which every 64-bit ARM has.
//!
//! Operands are f32. Shifted into place, an E4M3 code is the f16 of its value times 2^-8, subnormals included: `fcvtl`
//! widens it exactly. The NaN codes come out as a number and are looked for apart.

use std::arch::aarch64::*;
use std::arch::{asm, is_aarch64_feature_detected};

use crate::cpu::isa::{Block, Isa, Job, Strip};
use half::bf16;

/// Proof that the processor has NEON.
#[derive(Debug, Clone, Copy)]
pub struct Neon(());

impl Neon {
    /// Whether this processor has it.
    pub fn is_available() -> bool {
        is_aarch64_feature_detected!("neon")
    }

    /// The proof, if this processor has it.
    pub fn new() -> Option<Self> {
        // SAFETY: asked just before.
        Self::is_available().then(|| unsafe { Self::new_unchecked() })
    }

    /// The proof, on the caller's word.
    ///
    /// # Safety
    /// [`is_available`](Self::is_available) must be true.
    pub unsafe fn new_unchecked() -> Self {
        Self(())
    }
}

/// With two vectors of features 24 sums, which leaves 8 of 32 registers for the operands.
const ROWS: usize = 12;
/// Two vectors of sums.
const FEATURES: usize = 8;
const CHUNK: usize = 16;
/// Elements of a vector.
const LANES: usize = 4;
/// Bytes by which weights are fetched ahead of their use.
const AHEAD: usize = 2048;

/// Calls for a number of rows that is known when compiling.
macro_rules! for_rows {
    ($rows:expr, $r:ident => $call:block) => {
        for_rows!(@ $rows, $r, $call, 1 2 3 4 5 6 7 8 9 10 11 12)
    };
    (@ $rows:expr, $r:ident, $call:block, $($n:literal)*) => {
        match $rows {
            $($n => {
                const $r: usize = $n;
                $call
            })*
            rows => unreachable!("a tile of {rows} rows"),
        }
    };
}

impl Isa for Neon {
    type Operand = f32;
    const DEPTH: usize = 1;
    const ROWS: usize = ROWS;
    const FEATURES: usize = FEATURES;
    const CHUNK: usize = CHUNK;

    fn vectorize<J: Job>(self, job: J) -> J::Output {
        #[target_feature(enable = "neon")]
        fn run<J: Job>(job: J) -> J::Output {
            job.run()
        }
        // SAFETY: `self` proves that the processor has NEON.
        unsafe { run(job) }
    }

    fn dot_e4m3<const M: usize>(self, strip: &Strip<'_, u8, f32>, out: &mut [f32]) {
        // SAFETY: `self` proves that the processor has NEON.
        unsafe { dot_rows::<M, E4m3>(strip, out) }
    }

    fn dot_bf16<const M: usize>(self, strip: &Strip<'_, bf16, f32>, out: &mut [f32]) {
        // SAFETY: `self` proves that the processor has NEON.
        unsafe { dot_rows::<M, Bf16>(strip, out) }
    }

    fn pack_e4m3(self, block: &Block<'_, u8>, panel: &mut [f32]) {
        // SAFETY: `self` proves that the processor has NEON.
        unsafe { pack::<E4m3>(block, panel) }
    }

    fn pack_bf16(self, block: &Block<'_, bf16>, panel: &mut [f32]) {
        // SAFETY: `self` proves that the processor has NEON.
        unsafe { pack::<Bf16>(block, panel) }
    }

    fn tile(self, rows: usize, a: &[f32], panel: &[f32], add: bool, sums: &mut [f32]) {
        let groups = panel.len() / FEATURES;
        assert_eq!(panel.len(), groups * FEATURES);
        assert_eq!(a.len(), groups * rows);
        assert!(sums.len() >= rows * FEATURES);
        let (a, b, sums) = (a.as_ptr(), panel.as_ptr(), sums.as_mut_ptr());
        for_rows!(rows, R => {
            // SAFETY: `self` proves that the processor has NEON, and the lengths were checked.
            unsafe { tile::<R>(a, b, groups, add, sums) }
        });
    }

    fn tile_f32(self, rows: usize, a: &[f32], panel: &[f32], sums: &mut [f32]) {
        self.tile(rows, a, panel, false, sums);
    }

    #[inline(always)]
    fn prefetch<T>(self, address: *const T) {
        // SAFETY: a hint, for any address.
        unsafe {
            asm!("prfm pldl2keep, [{}]", in(reg) address, options(nostack, preserves_flags, readonly));
        }
    }

    fn multiply(self, rounds: usize) -> u64 {
        // SAFETY: `self` proves that the processor has NEON.
        unsafe { multiply(rounds) }
    }
}

/// Asks for a cache line that is used soon; the address need not be valid.
#[inline(always)]
fn prefetch_soon<T>(address: *const T) {
    // SAFETY: a hint, for any address.
    unsafe {
        asm!("prfm pldl1keep, [{}]", in(reg) address, options(nostack, preserves_flags, readonly));
    }
}

/// What turns weights into f32.
trait Source {
    type Weight: Copy + Default;
    /// What the values of `load` have to be multiplied by.
    const SCALE: f32;
    /// 16 weights; NaN codes are added to `nan`.
    ///
    /// # Safety
    /// The processor has NEON, and 16 weights are readable.
    unsafe fn load(from: *const Self::Weight, nan: &mut uint8x16_t) -> [float32x4_t; 4];
    /// Four rows of 16 weights as 16 columns of four values.
    ///
    /// # Safety
    /// The processor has NEON.
    unsafe fn columns(rows: &[[Self::Weight; CHUNK]; LANES]) -> [float32x4_t; CHUNK];
}

struct E4m3;

impl Source for E4m3 {
    type Weight = u8;
    const SCALE: f32 = 256.0;

    #[inline(always)]
    unsafe fn load(from: *const u8, nan: &mut uint8x16_t) -> [float32x4_t; 4] {
        // SAFETY: as the caller says.
        unsafe {
            let codes = vld1q_u8(from);
            // Without their sign, NaN codes are the largest there are.
            *nan = vmaxq_u8(*nan, vaddq_u8(codes, codes));
            widen(codes)
        }
    }

    #[inline(always)]
    unsafe fn columns(rows: &[[u8; CHUNK]; LANES]) -> [float32x4_t; CHUNK] {
        // SAFETY: the processor has NEON, as the caller says, and a row is 16 bytes.
        unsafe {
            let [a, b, c, d] = rows.each_ref().map(|row| vld1q_u8(row.as_ptr()));
            let even = [vzip1q_u8(a, c), vzip2q_u8(a, c)];
            let odd = [vzip1q_u8(b, d), vzip2q_u8(b, d)];
            let mut columns = [vdupq_n_f32(0.0); CHUNK];
            for half in 0..2 {
                let fours = [
                    vzip1q_u8(even[half], odd[half]),
                    vzip2q_u8(even[half], odd[half]),
                ];
                for (four, codes) in fours.into_iter().enumerate() {
                    let at = (2 * half + four) * LANES;
                    for (column, value) in columns[at..].iter_mut().zip(widen(codes)) {
                        *column = finish(value);
                    }
                }
            }
            columns
        }
    }
}

struct Bf16;

impl Source for Bf16 {
    type Weight = bf16;
    const SCALE: f32 = 1.0;

    #[inline(always)]
    unsafe fn load(from: *const bf16, _: &mut uint8x16_t) -> [float32x4_t; 4] {
        // SAFETY: as the caller says.
        unsafe {
            let from = from.cast();
            let [a, b] = widen_bf16(vld1q_u16(from));
            let [c, d] = widen_bf16(vld1q_u16(from.add(8)));
            [a, b, c, d]
        }
    }

    #[inline(always)]
    unsafe fn columns(rows: &[[bf16; CHUNK]; LANES]) -> [float32x4_t; CHUNK] {
        // SAFETY: the processor has NEON, as the caller says, and a row is two vectors.
        unsafe {
            let mut columns = [vdupq_n_f32(0.0); CHUNK];
            for (half, columns) in columns.chunks_exact_mut(8).enumerate() {
                let load = |row: &[bf16; CHUNK]| vld1q_u16(row.as_ptr().add(8 * half).cast());
                let [a, b, c, d] = rows.each_ref().map(load);
                let even = [vzip1q_u16(a, c), vzip2q_u16(a, c)];
                let odd = [vzip1q_u16(b, d), vzip2q_u16(b, d)];
                for (quarter, columns) in columns.chunks_exact_mut(4).enumerate() {
                    let (even, odd) = (even[quarter], odd[quarter]);
                    columns[..2].copy_from_slice(&widen_bf16(vzip1q_u16(even, odd)));
                    columns[2..].copy_from_slice(&widen_bf16(vzip2q_u16(even, odd)));
                }
            }
            columns
        }
    }
}

/// The values of 16 codes, times 2^-8; those of NaN codes are ±1.875.
#[inline]
#[target_feature(enable = "neon")]
fn widen(codes: uint8x16_t) -> [float32x4_t; 4] {
    let codes = vreinterpretq_s8_u8(codes);
    // The sign ends up in two bits, of which one belongs to the exponent.
    let exponent = vdupq_n_u16(!0x4000);
    let f16 = |bits| vreinterpretq_f16_u16(vandq_u16(vreinterpretq_u16_s16(bits), exponent));
    let low = f16(vshll_n_s8::<7>(vget_low_s8(codes)));
    let high = f16(vshll_high_n_s8::<7>(codes));
    [
        vcvt_f32_f16(vget_low_f16(low)),
        vcvt_high_f32_f16(low),
        vcvt_f32_f16(vget_low_f16(high)),
        vcvt_high_f32_f16(high),
    ]
}

/// What `widen` gave, times 2^8 and with NaN where the code said so.
#[inline]
#[target_feature(enable = "neon")]
fn finish(value: float32x4_t) -> float32x4_t {
    // All bits where it is ±1.875, which makes a NaN of it.
    let nan = vcageq_f32(value, vdupq_n_f32(1.875));
    let value = vmulq_n_f32(value, E4m3::SCALE);
    vreinterpretq_f32_u32(vorrq_u32(vreinterpretq_u32_f32(value), nan))
}

#[inline]
#[target_feature(enable = "neon")]
fn widen_bf16(bits: uint16x8_t) -> [float32x4_t; 2] {
    [vmovl_u16(vget_low_u16(bits)), vmovl_high_u16(bits)]
        .map(|bits| vreinterpretq_f32_u32(vshlq_n_u32::<16>(bits)))
}

#[target_feature(enable = "neon")]
fn dot_rows<const M: usize, S: Source>(strip: &Strip<'_, S::Weight, f32>, out: &mut [f32]) {
    let rows = strip.rows(M, CHUNK, out);
    // Vectors of sums of a row: together as many as hide the latency of an addition, as far as registers go.
    let ways = match M {
        1 => 16,
        2 => 8,
        3 | 4 => 4,
        _ => 2,
    };
    let vectors = CHUNK / LANES;
    let chunks = (ways / vectors).max(1);
    let mut scales = strip.scales.as_ptr();
    for (row, out) in out.chunks_exact_mut(M).enumerate().take(rows) {
        let mut totals = [vdupq_n_f32(0.0); M];
        let mut nan = vdupq_n_u8(0);
        let mut w = strip.weights[row * strip.pitch..].as_ptr();
        let mut x = strip.x.as_ptr();
        for &run in strip.runs {
            // SAFETY: `Strip::rows` checked that all weights, operands and scales of the runs exist.
            unsafe {
                let mut sums = [[vdupq_n_f32(0.0); 16]; M];
                let add = |sums: &mut [[float32x4_t; 16]; M],
                           chunk: usize,
                           w: [float32x4_t; 4],
                           x: *const f32| {
                    for (m, sums) in sums.iter_mut().enumerate() {
                        for (vector, w) in w.into_iter().enumerate() {
                            let x = vld1q_f32(x.add(m * strip.stride + vector * LANES));
                            let way = (chunk * vectors + vector) % ways;
                            sums[way] = vfmaq_f32(sums[way], w, x);
                        }
                    }
                };
                for _ in 0..run / (chunks * CHUNK) {
                    prefetch_soon(w.cast::<u8>().wrapping_add(AHEAD));
                    for chunk in 0..chunks {
                        let values = S::load(w.add(chunk * CHUNK), &mut nan);
                        add(&mut sums, chunk, values, x.add(chunk * CHUNK));
                    }
                    w = w.add(chunks * CHUNK);
                    x = x.add(chunks * CHUNK);
                }
                let mut rest = run % (chunks * CHUNK);
                while rest > 0 {
                    let len = rest.min(CHUNK);
                    let mut chunk = [S::Weight::default(); CHUNK];
                    std::ptr::copy_nonoverlapping(w, chunk.as_mut_ptr(), len);
                    let values = S::load(chunk.as_ptr(), &mut nan);
                    add(&mut sums, 0, values, x);
                    w = w.add(len);
                    x = x.add(CHUNK);
                    rest -= len;
                }
                for (m, (total, sums)) in totals.iter_mut().zip(sums).enumerate() {
                    *total = vfmaq_n_f32(*total, sum_vectors(sums, ways), *scales.add(m));
                }
                scales = scales.add(M);
            }
        }
        let nan = S::SCALE != 1.0 && vmaxvq_u8(nan) == 0xfe;
        for (out, total) in out.iter_mut().zip(totals) {
            *out = match nan {
                true => f32::NAN,
                false => vaddvq_f32(total) * S::SCALE,
            };
        }
    }
}

/// Adds up the first `count` vectors, a power of two, as a tree.
#[inline(always)]
fn sum_vectors(mut vectors: [float32x4_t; 16], mut count: usize) -> float32x4_t {
    while count > 1 {
        count /= 2;
        for i in 0..count {
            // SAFETY: only called where NEON is enabled.
            vectors[i] = unsafe { vaddq_f32(vectors[i], vectors[i + count]) };
        }
    }
    vectors[0]
}

#[target_feature(enable = "neon")]
fn pack<S: Source>(block: &Block<'_, S::Weight>, panel: &mut [f32]) {
    block.check(FEATURES, 1, panel);
    for start in (0..block.len).step_by(CHUNK) {
        let len = CHUNK.min(block.len - start);
        for first in (0..FEATURES).step_by(LANES) {
            let mut rows = [[S::Weight::default(); CHUNK]; LANES];
            for (row, copy) in (first..block.features).zip(&mut rows) {
                let from = &block.weights[row * block.stride + start..][..len];
                match from.first_chunk() {
                    Some(all) => *copy = *all,
                    None => copy[..len].copy_from_slice(from),
                }
            }
            // SAFETY: this function has NEON.
            let columns = unsafe { S::columns(&rows) };
            let groups = panel[start * FEATURES..].as_chunks_mut::<FEATURES>().0;
            let store = |(column, group): (float32x4_t, &mut [f32; FEATURES])| {
                let group: &mut [f32] = &mut group[first..][..LANES];
                // SAFETY: 4 elements.
                unsafe { vst1q_f32(group.as_mut_ptr(), column) };
            };
            // The same twice, as the compiler keeps columns in registers only if it knows how many there are.
            match groups.first_chunk_mut::<CHUNK>() {
                Some(all) => columns.into_iter().zip(all).for_each(store),
                None => columns.into_iter().zip(groups).for_each(store),
            }
        }
    }
}

/// A row's sums of all features of a panel.
type Sums = [float32x4_t; FEATURES / LANES];

/// # Safety
/// `a` has `groups · R` elements, `b` `groups · FEATURES`, `out` `R · FEATURES`.
#[target_feature(enable = "neon")]
unsafe fn tile<const R: usize>(
    a: *const f32,
    b: *const f32,
    groups: usize,
    add: bool,
    out: *mut f32,
) {
    let mut sums: [Sums; R] = [[vdupq_n_f32(0.0); FEATURES / LANES]; R];
    // SAFETY: in bounds, as the caller says.
    unsafe {
        if add {
            for (i, sum) in sums.as_flattened_mut().iter_mut().enumerate() {
                *sum = vld1q_f32(out.add(i * LANES));
            }
        }
        let (mut a, mut b) = (a, b);
        for _ in 0..groups {
            let panel = [vld1q_f32(b), vld1q_f32(b.add(LANES))];
            let (fours, rest) = sums.as_chunks_mut::<LANES>();
            for (four, sums) in fours.iter_mut().enumerate() {
                let values = vld1q_f32(a.add(four * LANES));
                add_lane::<0>(&mut sums[0], &panel, values);
                add_lane::<1>(&mut sums[1], &panel, values);
                add_lane::<2>(&mut sums[2], &panel, values);
                add_lane::<3>(&mut sums[3], &panel, values);
            }
            for (r, sums) in rest.iter_mut().enumerate() {
                add_lane::<0>(sums, &panel, vdupq_n_f32(*a.add(R / LANES * LANES + r)));
            }
            a = a.add(R);
            b = b.add(FEATURES);
        }
        for (i, sum) in sums.as_flattened().iter().enumerate() {
            vst1q_f32(out.add(i * LANES), *sum);
        }
    }
}

/// `sums += panel · values[LANE]`
#[inline]
#[target_feature(enable = "neon")]
fn add_lane<const LANE: i32>(sums: &mut Sums, panel: &Sums, values: float32x4_t) {
    for (sum, panel) in sums.iter_mut().zip(panel) {
        *sum = vfmaq_laneq_f32::<LANE>(*sum, *panel, values);
    }
}

#[target_feature(enable = "neon")]
fn multiply(rounds: usize) -> u64 {
    /// More than the additions in flight.
    const CHAINS: usize = 24;
    let mut sums = [vdupq_n_f32(0.0); CHAINS];
    let x = vdupq_n_f32(std::hint::black_box(0.0));
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = vfmaq_f32(*sum, x, x);
        }
    }
    let total = sums
        .into_iter()
        .fold(vdupq_n_f32(0.0), |a, b| vaddq_f32(a, b));
    std::hint::black_box(vaddvq_f32(total));
    (rounds * CHAINS * 2 * LANES) as u64
}
