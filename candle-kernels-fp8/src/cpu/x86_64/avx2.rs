//! Inner loops for AVX2 with FMA and F16C (Haswell and newer, every Zen).
//!
//! Operands are f32. Shifted into place, an E4M3 code is the f16 of its value times 2^-8, subnormals included: F16C
//! widens it exactly. The NaN codes come out as a number and are looked for apart.

use std::arch::x86_64::*;

use crate::cpu::isa::{Block, Isa, Job, Strip};
use half::bf16;

/// Proof that the processor has AVX2, FMA and F16C.
#[derive(Debug, Clone, Copy)]
pub struct Avx2(());

impl Avx2 {
    /// Whether this processor has all of it.
    pub fn is_available() -> bool {
        is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
    }

    /// The proof, if this processor has all of it.
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

const ROWS: usize = 6;
/// Two vectors of sums.
const FEATURES: usize = 16;
const CHUNK: usize = 16;
/// Bytes by which weights are fetched ahead of their use.
const AHEAD: usize = 2048;

impl Isa for Avx2 {
    type Operand = f32;
    const DEPTH: usize = 1;
    const ROWS: usize = ROWS;
    const FEATURES: usize = FEATURES;
    const CHUNK: usize = CHUNK;

    fn vectorize<J: Job>(self, job: J) -> J::Output {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn run<J: Job>(job: J) -> J::Output {
            job.run()
        }
        // SAFETY: `self` proves that the processor has the features.
        unsafe { run(job) }
    }

    fn dot_e4m3<const M: usize>(self, strip: &Strip<'_, u8, f32>, out: &mut [f32]) {
        // SAFETY: `self` proves that the processor has the features.
        unsafe { dot_rows::<M, E4m3>(strip, out) }
    }

    fn dot_bf16<const M: usize>(self, strip: &Strip<'_, bf16, f32>, out: &mut [f32]) {
        // SAFETY: `self` proves that the processor has the features.
        unsafe { dot_rows::<M, Bf16>(strip, out) }
    }

    fn pack_e4m3(self, block: &Block<'_, u8>, panel: &mut [f32]) {
        // SAFETY: `self` proves that the processor has the features.
        unsafe { pack_e4m3(block, panel) }
    }

    fn pack_bf16(self, block: &Block<'_, bf16>, panel: &mut [f32]) {
        block.check(FEATURES, 1, panel);
        panel.fill(0.0);
        for (feature, row) in block
            .weights
            .chunks(block.stride)
            .take(block.features)
            .enumerate()
        {
            for (group, w) in panel.chunks_exact_mut(FEATURES).zip(row) {
                group[feature] = w.to_f32();
            }
        }
    }

    fn tile(self, rows: usize, a: &[f32], panel: &[f32], add: bool, sums: &mut [f32]) {
        let groups = panel.len() / FEATURES;
        assert_eq!(panel.len(), groups * FEATURES);
        assert_eq!(a.len(), groups * rows);
        assert!(sums.len() >= rows * FEATURES && (1..=ROWS).contains(&rows));
        let (a, b, sums) = (a.as_ptr(), panel.as_ptr(), sums.as_mut_ptr());
        // SAFETY: `self` proves that the processor has the features, and the lengths were checked.
        unsafe {
            match rows {
                1 => tile::<1>(a, b, groups, add, sums),
                2 => tile::<2>(a, b, groups, add, sums),
                3 => tile::<3>(a, b, groups, add, sums),
                4 => tile::<4>(a, b, groups, add, sums),
                5 => tile::<5>(a, b, groups, add, sums),
                _ => tile::<ROWS>(a, b, groups, add, sums),
            }
        }
    }

    fn tile_f32(self, rows: usize, a: &[f32], panel: &[f32], sums: &mut [f32]) {
        self.tile(rows, a, panel, false, sums);
    }

    #[inline(always)]
    fn prefetch<T>(self, address: *const T) {
        // SAFETY: every x86-64 has it, for any address.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(address.cast()) };
    }

    fn multiply(self, rounds: usize) -> u64 {
        // SAFETY: `self` proves that the processor has the features.
        unsafe { multiply(rounds) }
    }
}

/// What turns weights into f32.
trait Source {
    type Weight: Copy;
    /// What the values have to be multiplied by.
    const SCALE: f32;
    /// 16 weights; NaN codes are added to `nan`.
    ///
    /// # Safety
    /// The processor has the features of [`Avx2`], and 16 weights are readable.
    unsafe fn load(from: *const Self::Weight, nan: &mut __m128i) -> [__m256; 2];
}

struct E4m3;

impl Source for E4m3 {
    type Weight = u8;
    const SCALE: f32 = 256.0;

    #[inline(always)]
    unsafe fn load(from: *const u8, nan: &mut __m128i) -> [__m256; 2] {
        // SAFETY: as the caller says.
        unsafe {
            let codes = _mm_loadu_si128(from.cast());
            // Without their sign, NaN codes are the largest there are.
            *nan = _mm_max_epu8(*nan, _mm_add_epi8(codes, codes));
            widen(codes)
        }
    }
}

struct Bf16;

impl Source for Bf16 {
    type Weight = bf16;
    const SCALE: f32 = 1.0;

    #[inline(always)]
    unsafe fn load(from: *const bf16, _: &mut __m128i) -> [__m256; 2] {
        // SAFETY: as the caller says.
        unsafe {
            let load = |at: usize| {
                let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.add(at).cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
            };
            [load(0), load(8)]
        }
    }
}

/// The values of 16 codes, times 2^-8; those of NaN codes are numbers.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn widen(codes: __m128i) -> [__m256; 2] {
    // The sign ends up in two bits, of which one belongs to the exponent.
    let bits = _mm256_slli_epi16::<7>(_mm256_cvtepi8_epi16(codes));
    let bits = _mm256_and_si256(bits, _mm256_set1_epi16(!0x4000));
    [
        _mm256_cvtph_ps(_mm256_castsi256_si128(bits)),
        _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(bits)),
    ]
}

/// Whether a NaN code was among those that a `Source` loaded.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn any_nan(largest: __m128i) -> bool {
    _mm_movemask_epi8(_mm_cmpeq_epi8(largest, _mm_set1_epi8(-2))) != 0
}

#[expect(
    clippy::needless_range_loop,
    reason = "an index goes with weights, activations and sums"
)]
#[target_feature(enable = "avx2,fma,f16c")]
fn dot_rows<const M: usize, S: Source>(strip: &Strip<'_, S::Weight, f32>, out: &mut [f32]) {
    let rows = strip.rows(M, CHUNK, out);
    // Chunks that have sums of their own: as many as hide the latency of an addition, as far as registers go.
    let ways = if M == 1 {
        4
    } else if M == 2 {
        2
    } else {
        1
    };
    let mut scales = strip.scales.as_ptr();
    for row in 0..rows {
        let mut totals = [_mm256_setzero_ps(); M];
        let mut nan = _mm_setzero_si128();
        let mut w = strip.weights[row * strip.pitch..].as_ptr();
        let mut x = strip.x.as_ptr();
        for &run in strip.runs {
            // SAFETY: `Strip::rows` checked that all weights, operands and scales of the runs exist. Prefetching needs
            // no valid address.
            unsafe {
                let mut sums = [[[_mm256_setzero_ps(); 2]; 4]; M];
                let add = |sums: &mut [[[__m256; 2]; 4]; M],
                           way: usize,
                           w: [__m256; 2],
                           x: *const f32| {
                    for m in 0..M {
                        for half in 0..2 {
                            let x = _mm256_loadu_ps(x.add(m * strip.stride + 8 * half));
                            sums[m][way][half] = _mm256_fmadd_ps(w[half], x, sums[m][way][half]);
                        }
                    }
                };
                for _ in 0..run / (ways * CHUNK) {
                    _mm_prefetch::<_MM_HINT_T0>(w.cast::<i8>().wrapping_add(AHEAD));
                    for way in 0..ways {
                        let values = S::load(w.add(way * CHUNK), &mut nan);
                        add(&mut sums, way, values, x.add(way * CHUNK));
                    }
                    w = w.add(ways * CHUNK);
                    x = x.add(ways * CHUNK);
                }
                let mut rest = run % (ways * CHUNK);
                while rest > 0 {
                    let len = rest.min(CHUNK);
                    // SAFETY: all-zero bits are a weight of value 0.
                    let mut chunk: [S::Weight; CHUNK] = std::mem::zeroed();
                    std::ptr::copy_nonoverlapping(w, chunk.as_mut_ptr(), len);
                    let values = S::load(chunk.as_ptr(), &mut nan);
                    add(&mut sums, 0, values, x);
                    w = w.add(len);
                    x = x.add(CHUNK);
                    rest -= len;
                }
                for m in 0..M {
                    let ways = sums[m].map(|[a, b]| _mm256_add_ps(a, b));
                    let sum = _mm256_add_ps(
                        _mm256_add_ps(ways[0], ways[1]),
                        _mm256_add_ps(ways[2], ways[3]),
                    );
                    totals[m] = _mm256_fmadd_ps(sum, _mm256_set1_ps(*scales.add(m)), totals[m]);
                }
                scales = scales.add(M);
            }
        }
        let nan = S::SCALE != 1.0 && any_nan(nan);
        for m in 0..M {
            let sum = sum_lanes(totals[m]) * S::SCALE;
            out[row * M + m] = if nan { f32::NAN } else { sum };
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn sum_lanes(lanes: __m256) -> f32 {
    let four = _mm_add_ps(
        _mm256_castps256_ps128(lanes),
        _mm256_extractf128_ps::<1>(lanes),
    );
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
}

#[target_feature(enable = "avx2,fma,f16c")]
fn pack_e4m3(block: &Block<'_, u8>, panel: &mut [f32]) {
    block.check(FEATURES, 1, panel);
    let scale = _mm256_set1_ps(256.0);
    for start in (0..block.len).step_by(16) {
        let len = (block.len - start).min(16);
        let mut rows = [[0u8; 16]; FEATURES];
        for (row, bytes) in rows.iter_mut().take(block.features).enumerate() {
            bytes[..len].copy_from_slice(&block.weights[row * block.stride + start..][..len]);
        }
        // SAFETY: 16 bytes each.
        let mut columns = rows.map(|row| unsafe { _mm_loadu_si128(row.as_ptr().cast()) });
        transpose(&mut columns);
        let groups = panel[start * FEATURES..].chunks_exact_mut(FEATURES);
        for (codes, group) in columns.into_iter().zip(groups).take(len) {
            let magnitudes = _mm_and_si128(codes, _mm_set1_epi8(0x7f));
            let nan = _mm_cmpeq_epi8(magnitudes, _mm_set1_epi8(0x7f));
            let values = widen(codes);
            let nans = [
                _mm256_cvtepi8_epi32(nan),
                _mm256_cvtepi8_epi32(_mm_srli_si128::<8>(nan)),
            ];
            for ((value, nan), out) in values.into_iter().zip(nans).zip(group.chunks_exact_mut(8)) {
                let value = _mm256_mul_ps(value, scale);
                // SAFETY: 8 elements.
                unsafe {
                    _mm256_storeu_ps(
                        out.as_mut_ptr(),
                        _mm256_or_ps(value, _mm256_castsi256_ps(nan)),
                    )
                };
            }
        }
    }
}

/// Transposes 16 × 16 bytes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn transpose(rows: &mut [__m128i; 16]) {
    // Interleaving the two halves of 256 elements moves each index left by one bit: four times swap row and column.
    for _ in 0..4 {
        let from = *rows;
        for i in 0..8 {
            rows[2 * i] = _mm_unpacklo_epi8(from[i], from[i + 8]);
            rows[2 * i + 1] = _mm_unpackhi_epi8(from[i], from[i + 8]);
        }
    }
}

/// # Safety
/// `a` has `groups · R` elements, `b` `groups · FEATURES`, `out` `R · FEATURES`.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tile<const R: usize>(
    a: *const f32,
    b: *const f32,
    groups: usize,
    add: bool,
    out: *mut f32,
) {
    let mut sums = [[_mm256_setzero_ps(); 2]; R];
    // SAFETY: in bounds, as the caller says.
    unsafe {
        if add {
            for (i, sum) in sums.as_flattened_mut().iter_mut().enumerate() {
                *sum = _mm256_loadu_ps(out.add(i * 8));
            }
        }
        let (mut a, mut b) = (a, b);
        for _ in 0..groups {
            let panel = [_mm256_loadu_ps(b), _mm256_loadu_ps(b.add(8))];
            for (r, sums) in sums.iter_mut().enumerate() {
                let value = _mm256_set1_ps(*a.add(r));
                sums[0] = _mm256_fmadd_ps(value, panel[0], sums[0]);
                sums[1] = _mm256_fmadd_ps(value, panel[1], sums[1]);
            }
            a = a.add(R);
            b = b.add(FEATURES);
        }
        for (r, sums) in sums.iter().enumerate() {
            _mm256_storeu_ps(out.add(r * FEATURES), sums[0]);
            _mm256_storeu_ps(out.add(r * FEATURES + 8), sums[1]);
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn multiply(rounds: usize) -> u64 {
    /// More than the additions in flight.
    const CHAINS: usize = 12;
    let mut sums = [_mm256_setzero_ps(); CHAINS];
    let x = _mm256_set1_ps(std::hint::black_box(0.0));
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm256_fmadd_ps(x, x, *sum);
        }
    }
    let total = sums
        .into_iter()
        .fold(_mm256_setzero_ps(), |a, b| _mm256_add_ps(a, b));
    std::hint::black_box(sum_lanes(total));
    (rounds * CHAINS * 16) as u64
}
