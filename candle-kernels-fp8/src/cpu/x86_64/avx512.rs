//! Inner loops for AVX-512 with VBMI and BF16 (Zen 4 and newer, Sapphire Rapids and newer).
//!
//! Operands are bf16. E4M3 codes and BF16 values fit without rounding, and `vdpbf16ps` adds the products of 32 pairs to
//! 16 f32 sums. It takes subnormal operands as zero; no E4M3 value is a subnormal bf16.

use std::arch::x86_64::*;

use crate::cpu::isa::{Block, Isa, Job, Strip};
use crate::e4m3;
use half::bf16;

/// Proof that the processor has AVX-512 F, BW, VL, VBMI and BF16.
#[derive(Debug, Clone, Copy)]
pub struct Avx512(());

impl Avx512 {
    /// Whether this processor has all of it.
    pub fn is_available() -> bool {
        is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vbmi")
            && is_x86_feature_detected!("avx512bf16")
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

const ROWS: usize = 12;
/// Two vectors of sums.
const FEATURES: usize = 32;
const CHUNK: usize = 64;
/// Bytes by which weights are fetched ahead of their use.
const AHEAD: usize = 4096;

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

impl Isa for Avx512 {
    type Operand = u16;
    const DEPTH: usize = 2;
    const ROWS: usize = ROWS;
    const FEATURES: usize = FEATURES;
    const CHUNK: usize = CHUNK;

    fn vectorize<J: Job>(self, job: J) -> J::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
        fn run<J: Job>(job: J) -> J::Output {
            job.run()
        }
        // SAFETY: `self` proves that the processor has the features.
        unsafe { run(job) }
    }

    fn dot_e4m3<const M: usize>(self, strip: &Strip<'_, u8, u16>, out: &mut [f32]) {
        // SAFETY: `self` proves that the processor has the features.
        unsafe { dot_rows::<M, E4m3>(strip, out) }
    }

    fn dot_bf16<const M: usize>(self, strip: &Strip<'_, bf16, u16>, out: &mut [f32]) {
        // SAFETY: `self` proves that the processor has the features.
        unsafe { dot_rows::<M, Bf16>(strip, out) }
    }

    fn pack_e4m3(self, block: &Block<'_, u8>, panel: &mut [u16]) {
        // SAFETY: `self` proves that the processor has the features.
        unsafe { pack::<E4m3>(block, panel) }
    }

    fn pack_bf16(self, block: &Block<'_, bf16>, panel: &mut [u16]) {
        // SAFETY: `self` proves that the processor has the features.
        unsafe { pack::<Bf16>(block, panel) }
    }

    fn tile(self, rows: usize, a: &[u16], panel: &[u16], add: bool, sums: &mut [f32]) {
        let groups = panel.len() / (2 * FEATURES);
        assert_eq!(panel.len(), groups * 2 * FEATURES);
        assert_eq!(a.len(), groups * 2 * rows);
        assert!(sums.len() >= rows * FEATURES);
        let (a, b, sums) = (a.as_ptr(), panel.as_ptr(), sums.as_mut_ptr());
        for_rows!(rows, R => {
            // SAFETY: `self` proves that the processor has the features, and the lengths were checked.
            unsafe { tile::<R>(a, b, groups, add, sums) }
        });
    }

    fn tile_f32(self, rows: usize, a: &[f32], panel: &[f32], sums: &mut [f32]) {
        let groups = panel.len() / FEATURES;
        assert_eq!(panel.len(), groups * FEATURES);
        assert_eq!(a.len(), groups * rows);
        assert!(sums.len() >= rows * FEATURES);
        let (a, b, sums) = (a.as_ptr(), panel.as_ptr(), sums.as_mut_ptr());
        for_rows!(rows, R => {
            // SAFETY: `self` proves that the processor has the features, and the lengths were checked.
            unsafe { tile_f32::<R>(a, b, groups, sums) }
        });
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

/// What turns weights into bf16.
trait Source {
    type Weight;
    /// Constants that stay in registers.
    type Tables: Copy;
    fn tables() -> Self::Tables;
    /// 64 weights in their order as two vectors of bf16; zeros where `mask` has no bit.
    ///
    /// # Safety
    /// The processor has the features of [`Avx512`], and the weights with a bit in `mask` are readable.
    unsafe fn load(tables: &Self::Tables, from: *const Self::Weight, mask: u64) -> [__m512bh; 2];
    /// As `load`, without a mask.
    ///
    /// # Safety
    /// As for `load`.
    unsafe fn load_all(tables: &Self::Tables, from: *const Self::Weight) -> [__m512bh; 2];
    /// 16 rows of 64 bytes, transposed in units of four, as pairs of weights: vector g holds pair g of each row.
    const PAIRS: usize;
    /// # Safety
    /// The processor has the features of [`Avx512`].
    unsafe fn pairs(tables: &Self::Tables, four_bytes: __m512i) -> [__m512i; 2];
}

/// High or low bytes of the bf16 of the 128 codes without sign.
const fn bytes(shift: u32) -> [u8; 128] {
    let mut bytes = [0; 128];
    let mut code = 0;
    while code < 128 {
        bytes[code] = (e4m3::widen(code as u8).to_bits() >> shift) as u8;
        code += 1;
    }
    bytes
}
static LOW: [u8; 128] = bytes(16);
static HIGH: [u8; 128] = bytes(24);

struct E4m3;

/// Tables of bytes and orders.
#[derive(Clone, Copy)]
struct Lookup {
    low: [__m512i; 2],
    high: [__m512i; 2],
    sign: __m512i,
    /// So that interleaving within 128 bits leaves the weights in their order.
    interleave: __m512i,
    /// Low and high bytes of the first, and of the last two of each four.
    first: __m512i,
    last: __m512i,
}

/// Where bytes `2 · half` and `2 · half + 1` of each four are, low (first table) and high (second) alternating.
const fn halves(half: usize) -> [u8; 64] {
    let mut order = [0; 64];
    let mut i = 0;
    while i < 64 {
        let code = i / 4 * 4 + 2 * half + i / 2 % 2;
        order[i] = (code + i % 2 * 64) as u8;
        i += 1;
    }
    order
}
static FIRST: [u8; 64] = halves(0);
static LAST: [u8; 64] = halves(1);

impl Lookup {
    /// The low and high bytes of 64 codes as bf16.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512bf16")]
    fn bytes(&self, codes: __m512i) -> (__m512i, __m512i) {
        let low = _mm512_permutex2var_epi8(self.low[0], codes, self.low[1]);
        let high = _mm512_permutex2var_epi8(self.high[0], codes, self.high[1]);
        // high | (codes & sign)
        (
            low,
            _mm512_ternarylogic_epi32::<0xf8>(high, codes, self.sign),
        )
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512bf16")]
    fn widen(&self, codes: __m512i) -> [__m512bh; 2] {
        let codes = _mm512_permutexvar_epi64(self.interleave, codes);
        let (low, high) = self.bytes(codes);
        [
            as_bf16(_mm512_unpacklo_epi8(low, high)),
            as_bf16(_mm512_unpackhi_epi8(low, high)),
        ]
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512bf16")]
    fn new() -> Self {
        // SAFETY: the tables are 64 or 2 · 64 bytes.
        unsafe {
            let load = |bytes: *const u8| _mm512_loadu_si512(bytes.cast());
            Self {
                low: [load(LOW.as_ptr()), load(LOW.as_ptr().add(64))],
                high: [load(HIGH.as_ptr()), load(HIGH.as_ptr().add(64))],
                sign: _mm512_set1_epi8(i8::MIN),
                interleave: _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7),
                first: load(FIRST.as_ptr()),
                last: load(LAST.as_ptr()),
            }
        }
    }
}

impl Source for E4m3 {
    type Weight = u8;
    type Tables = Lookup;
    const PAIRS: usize = 2;

    #[inline(always)]
    fn tables() -> Lookup {
        // SAFETY: only called where the features are enabled.
        unsafe { Lookup::new() }
    }

    #[inline(always)]
    unsafe fn load(tables: &Lookup, from: *const u8, mask: u64) -> [__m512bh; 2] {
        // SAFETY: as the caller says; code 0 is the value 0.
        unsafe { tables.widen(_mm512_maskz_loadu_epi8(mask, from.cast())) }
    }

    #[inline(always)]
    unsafe fn load_all(tables: &Lookup, from: *const u8) -> [__m512bh; 2] {
        // SAFETY: as the caller says.
        unsafe { tables.widen(_mm512_loadu_si512(from.cast())) }
    }

    #[inline(always)]
    unsafe fn pairs(tables: &Lookup, codes: __m512i) -> [__m512i; 2] {
        // SAFETY: as the caller says.
        unsafe {
            let (low, high) = tables.bytes(codes);
            [
                _mm512_permutex2var_epi8(low, tables.first, high),
                _mm512_permutex2var_epi8(low, tables.last, high),
            ]
        }
    }
}

struct Bf16;

impl Source for Bf16 {
    type Weight = bf16;
    type Tables = ();
    const PAIRS: usize = 1;

    #[inline(always)]
    fn tables() {}

    #[inline(always)]
    unsafe fn load(_: &(), from: *const bf16, mask: u64) -> [__m512bh; 2] {
        // SAFETY: as the caller says.
        unsafe {
            let load = |at: usize, mask: u32| {
                as_bf16(_mm512_maskz_loadu_epi16(mask, from.wrapping_add(at).cast()))
            };
            [load(0, mask as u32), load(32, (mask >> 32) as u32)]
        }
    }

    #[inline(always)]
    unsafe fn load_all(_: &(), from: *const bf16) -> [__m512bh; 2] {
        // SAFETY: as the caller says.
        unsafe {
            [
                as_bf16(_mm512_loadu_si512(from.cast())),
                as_bf16(_mm512_loadu_si512(from.add(32).cast())),
            ]
        }
    }

    #[inline(always)]
    unsafe fn pairs(_: &(), pairs: __m512i) -> [__m512i; 2] {
        [pairs, pairs]
    }
}

#[inline(always)]
fn as_bf16(bits: __m512i) -> __m512bh {
    // SAFETY: two views of the same 64 bytes.
    unsafe { std::mem::transmute(bits) }
}

#[expect(
    clippy::needless_range_loop,
    reason = "an index goes with weights, activations and sums"
)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512bf16")]
fn dot_rows<const M: usize, S: Source>(strip: &Strip<'_, S::Weight, u16>, out: &mut [f32]) {
    let rows = strip.rows(M, CHUNK, out);
    let tables = S::tables();
    // Chunks that have sums of their own: additions to one sum wait for each other.
    let ways = if M <= 4 { 2 } else { 1 };
    let mut scales = strip.scales.as_ptr();
    for row in 0..rows {
        let mut totals = [_mm512_setzero_ps(); M];
        let mut w = strip.weights[row * strip.pitch..].as_ptr();
        let mut x = strip.x.as_ptr();
        for &run in strip.runs {
            // SAFETY: `Strip::rows` checked that all weights, operands and scales of the runs exist. Prefetching needs
            // no valid address.
            unsafe {
                let mut sums = [[[_mm512_setzero_ps(); 2]; 2]; M];
                let operand = |x: *const u16, m: usize, half: usize| {
                    as_bf16(_mm512_loadu_si512(
                        x.add(m * strip.stride + 32 * half).cast(),
                    ))
                };
                for _ in 0..run / (ways * CHUNK) {
                    for line in 0..ways * size_of::<S::Weight>() {
                        let ahead = w.cast::<i8>().wrapping_add(AHEAD + 64 * line);
                        _mm_prefetch::<_MM_HINT_T0>(ahead);
                    }
                    for way in 0..ways {
                        let values = S::load_all(&tables, w.add(way * CHUNK));
                        for m in 0..M {
                            for half in 0..2 {
                                let x = operand(x.add(way * CHUNK), m, half);
                                sums[m][way][half] =
                                    _mm512_dpbf16_ps(sums[m][way][half], values[half], x);
                            }
                        }
                    }
                    w = w.add(ways * CHUNK);
                    x = x.add(ways * CHUNK);
                }
                let mut rest = run % (ways * CHUNK);
                while rest > 0 {
                    let len = rest.min(CHUNK);
                    let values = S::load(&tables, w, u64::MAX >> (CHUNK - len));
                    for m in 0..M {
                        for half in 0..2 {
                            let x = operand(x, m, half);
                            sums[m][0][half] = _mm512_dpbf16_ps(sums[m][0][half], values[half], x);
                        }
                    }
                    w = w.add(len);
                    x = x.add(CHUNK);
                    rest -= len;
                }
                for m in 0..M {
                    let [a, b] = sums[m].map(|[a, b]| _mm512_add_ps(a, b));
                    let scale = _mm512_set1_ps(*scales.add(m));
                    totals[m] = _mm512_fmadd_ps(_mm512_add_ps(a, b), scale, totals[m]);
                }
                scales = scales.add(M);
            }
        }
        for m in 0..M {
            out[row * M + m] = _mm512_reduce_add_ps(totals[m]);
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512bf16")]
fn pack<S: Source>(block: &Block<'_, S::Weight>, panel: &mut [u16]) {
    block.check(FEATURES, 2, panel);
    let tables = S::tables();
    // A vector of 64 bytes of each row.
    let step = 64 / size_of::<S::Weight>();
    for half in 0..2 {
        let first = half * 16;
        for start in (0..block.len).step_by(step) {
            let len = step.min(block.len - start);
            let mut rows = [_mm512_setzero_si512(); 16];
            if len == step && block.features >= first + 16 {
                let from = block.weights[first * block.stride + start..].as_ptr();
                for (row, vector) in rows.iter_mut().enumerate() {
                    // SAFETY: `Block::check` checked that the block has these rows, and it has `step` from here.
                    *vector = unsafe { _mm512_loadu_si512(from.add(row * block.stride).cast()) };
                }
            } else {
                let bytes = u64::MAX >> (64 - len * size_of::<S::Weight>());
                for (row, vector) in (first..block.features.min(first + 16)).zip(&mut rows) {
                    let from = &block.weights[row * block.stride + start..][..len];
                    // SAFETY: the mask selects the bytes of `from`.
                    *vector = unsafe { _mm512_maskz_loadu_epi8(bytes, from.as_ptr().cast()) };
                }
            }
            transpose(&mut rows);
            // Pairs of all 32 features, of which 16 are written here.
            let mut groups = panel[start * FEATURES..].chunks_exact_mut(2 * FEATURES);
            for row in rows {
                // SAFETY: this function has the features.
                let pairs = unsafe { S::pairs(&tables, row) };
                for (pairs, group) in pairs.into_iter().take(S::PAIRS).zip(groups.by_ref()) {
                    let group: &mut [u16] = &mut group[2 * first..][..32];
                    // SAFETY: 32 elements.
                    unsafe { _mm512_storeu_si512(group.as_mut_ptr().cast(), pairs) };
                }
            }
        }
    }
}

/// Transposes 16 × 16 elements of 4 bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512bf16")]
fn transpose(rows: &mut [__m512i; 16]) {
    let low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    let high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    // Interleaving the two halves of 256 elements moves each index left by one bit: four times swap row and column.
    for _ in 0..4 {
        let from = *rows;
        for i in 0..8 {
            rows[2 * i] = _mm512_permutex2var_epi32(from[i], low, from[i + 8]);
            rows[2 * i + 1] = _mm512_permutex2var_epi32(from[i], high, from[i + 8]);
        }
    }
}

/// # Safety
/// `a` has `groups · R` pairs, `b` `groups · FEATURES` pairs, `out` `R · FEATURES` elements.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512bf16")]
unsafe fn tile<const R: usize>(
    a: *const u16,
    b: *const u16,
    groups: usize,
    add: bool,
    out: *mut f32,
) {
    let mut sums = [[_mm512_setzero_ps(); 2]; R];
    // SAFETY: in bounds, as the caller says.
    unsafe {
        if add {
            for (i, sum) in sums.as_flattened_mut().iter_mut().enumerate() {
                *sum = _mm512_loadu_ps(out.add(i * 16));
            }
        }
        let (mut a, mut b) = (a.cast::<i32>(), b.cast::<i32>());
        for _ in 0..groups {
            let panel = [
                as_bf16(_mm512_loadu_si512(b.cast())),
                as_bf16(_mm512_loadu_si512(b.add(16).cast())),
            ];
            for (r, sums) in sums.iter_mut().enumerate() {
                let pair = as_bf16(_mm512_set1_epi32(a.add(r).read_unaligned()));
                sums[0] = _mm512_dpbf16_ps(sums[0], pair, panel[0]);
                sums[1] = _mm512_dpbf16_ps(sums[1], pair, panel[1]);
            }
            a = a.add(R);
            b = b.add(FEATURES);
        }
        for (r, sums) in sums.iter().enumerate() {
            _mm512_storeu_ps(out.add(r * FEATURES), sums[0]);
            _mm512_storeu_ps(out.add(r * FEATURES + 16), sums[1]);
        }
    }
}

/// # Safety
/// `a` has `groups · R` elements, `b` `groups · FEATURES`, `out` `R · FEATURES`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512bf16")]
unsafe fn tile_f32<const R: usize>(a: *const f32, b: *const f32, groups: usize, out: *mut f32) {
    let mut sums = [[_mm512_setzero_ps(); 2]; R];
    // SAFETY: in bounds, as the caller says.
    unsafe {
        let (mut a, mut b) = (a, b);
        for _ in 0..groups {
            let panel = [_mm512_loadu_ps(b), _mm512_loadu_ps(b.add(16))];
            for (r, sums) in sums.iter_mut().enumerate() {
                let value = _mm512_set1_ps(*a.add(r));
                sums[0] = _mm512_fmadd_ps(value, panel[0], sums[0]);
                sums[1] = _mm512_fmadd_ps(value, panel[1], sums[1]);
            }
            a = a.add(R);
            b = b.add(FEATURES);
        }
        for (r, sums) in sums.iter().enumerate() {
            _mm512_storeu_ps(out.add(r * FEATURES), sums[0]);
            _mm512_storeu_ps(out.add(r * FEATURES + 16), sums[1]);
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512bf16")]
fn multiply(rounds: usize) -> u64 {
    /// More than the additions in flight.
    const CHAINS: usize = 24;
    let mut sums = [_mm512_setzero_ps(); CHAINS];
    let x = as_bf16(_mm512_set1_epi32(std::hint::black_box(0)));
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm512_dpbf16_ps(*sum, x, x);
        }
    }
    let total = sums
        .into_iter()
        .fold(_mm512_setzero_ps(), |a, b| _mm512_add_ps(a, b));
    std::hint::black_box(_mm512_reduce_add_ps(total));
    (rounds * CHAINS * 64) as u64
}
