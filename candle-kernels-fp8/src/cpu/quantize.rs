//! Activations to E4M3. All arithmetic is in f32: scale = amax / 448, code = encode(x / scale).

use super::isa::{InstructionSet, Isa, Job, on};
use super::{TASK, rows_per_task};
use crate::e4m3;
use rayon::prelude::*;

/// Quantizes `x`, rows of `k`, with one scale for each `group` neighbours in a row (the last group may be short).
///
/// `group == k` is one scale for each row. A group of zeros gets the scale 1/448. A group with a NaN gets a NaN scale
/// and NaN codes; one with an infinity gets an infinite scale, and its finite values the code 0.
///
/// # Panics
/// If `k` or `group` is 0, `x` is not whole rows, `codes` is not as long as `x`, or `scales` is not `[rows, ceil(k / group)]`.
pub fn quantize_groups(x: &[f32], k: usize, group: usize, codes: &mut [u8], scales: &mut [f32]) {
    assert!(k > 0 && group > 0, "rows and groups are not empty");
    let groups = k.div_ceil(group);
    assert_eq!(x.len() % k, 0, "x is whole rows");
    assert_eq!(x.len(), codes.len(), "one code for each value");
    assert_eq!(
        scales.len(),
        x.len() / k * groups,
        "one scale for each group"
    );
    let task = |((x, codes), scales)| {
        vectorize(Groups {
            x,
            k,
            group,
            codes,
            scales,
        });
    };
    let rows = rows_per_task(k);
    if x.len() <= rows * k {
        task(((x, codes), scales));
    } else {
        x.par_chunks(rows * k)
            .zip(codes.par_chunks_mut(rows * k))
            .zip(scales.par_chunks_mut(rows * groups))
            .for_each(task);
    }
}

fn vectorize<J: Job>(job: J) -> J::Output {
    on!(InstructionSet::best(), isa => isa.vectorize(job))
}

/// Rows with a scale for each group.
struct Groups<'a> {
    x: &'a [f32],
    k: usize,
    group: usize,
    codes: &'a mut [u8],
    scales: &'a mut [f32],
}

impl Job for Groups<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let groups = self.k.div_ceil(self.group);
        let rows = self
            .x
            .chunks_exact(self.k)
            .zip(self.codes.chunks_exact_mut(self.k));
        for ((x, codes), scales) in rows.zip(self.scales.chunks_exact_mut(groups)) {
            let groups = x.chunks(self.group).zip(codes.chunks_mut(self.group));
            for ((x, codes), scale) in groups.zip(scales) {
                *scale = scale_of(amax(x));
                encode(x, *scale, codes);
            }
        }
    }
}

/// Values with one scale.
struct Encode<'a> {
    x: &'a [f32],
    scale: f32,
    codes: &'a mut [u8],
}

impl Job for Encode<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        encode(self.x, self.scale, self.codes);
    }
}

struct Amax<'a>(&'a [f32]);

impl Job for Amax<'_> {
    type Output = f32;

    #[inline(always)]
    fn run(self) -> f32 {
        amax(self.0)
    }
}

/// Quantizes `x` with one scale, which it returns; special values as in [`quantize_groups`].
///
/// # Panics
/// If `codes` is not as long as `x`.
pub fn quantize_tensor(x: &[f32], codes: &mut [u8]) -> f32 {
    let amax = match x.len() {
        0..=TASK => vectorize(Amax(x)),
        _ => x
            .par_chunks(TASK)
            .map(|x| vectorize(Amax(x)))
            .reduce(|| 0.0, max_or_nan),
    };
    let scale = scale_of(amax);
    quantize_static(x, scale, codes);
    scale
}

/// Quantizes `x` with a scale that is given: `encode(x / scale)`, which clamps to ±448.
///
/// # Panics
/// If `codes` is not as long as `x`.
pub fn quantize_static(x: &[f32], scale: f32, codes: &mut [u8]) {
    assert_eq!(x.len(), codes.len(), "one code for each value");
    let task = |(x, codes)| vectorize(Encode { x, scale, codes });
    match x.len() {
        0..=TASK => task((x, codes)),
        _ => x
            .par_chunks(TASK)
            .zip(codes.par_chunks_mut(TASK))
            .for_each(task),
    }
}

/// Rounds a value through E4M3: `decode(encode(x / scale)) · scale`, in f32.
pub fn fake_quantize(x: f32, scale: f32) -> f32 {
    e4m3::decode(e4m3::encode(x / scale)) * scale
}

#[inline(always)]
fn encode(x: &[f32], scale: f32, codes: &mut [u8]) {
    for (code, &x) in codes.iter_mut().zip(x) {
        *code = e4m3::encode(x / scale);
    }
}

/// The largest magnitude; NaN if there is one.
#[inline(always)]
pub(super) fn amax(x: &[f32]) -> f32 {
    // As integers, the magnitudes of floats sort as the floats do, with NaN above infinity.
    let largest = x
        .iter()
        .map(|x| x.to_bits() & 0x7fff_ffff)
        .fold(0, u32::max);
    f32::from_bits(largest)
}

/// The larger of two magnitudes; NaN if one of them is.
pub(super) fn max_or_nan(a: f32, b: f32) -> f32 {
    f32::from_bits(a.to_bits().max(b.to_bits()))
}

/// The scale for values up to `amax`: amax / 448, 1/448 for zeros, and never subnormal, so that dividing by it is sound.
#[inline(always)]
fn scale_of(amax: f32) -> f32 {
    let scale = if amax == 0.0 { 1.0 } else { amax } / e4m3::MAX;
    if scale < f32::MIN_POSITIVE {
        f32::MIN_POSITIVE
    } else {
        scale
    }
}
