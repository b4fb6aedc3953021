//! RMS norm of rows, with the rounding of transformers: the quotient is computed in f32 and rounded to the row's type,
//! then multiplied with the weight and rounded again.
//!
//! Floor: a row is read and written once, 3 · k operations; two rows more of traffic where a residual is added. A token
//! of 2048 is some hundred nanoseconds, a prompt of 512 tokens moves 4 MiB in BF16.

use super::element::Element;
use super::fill::fill;
use super::isa::{InstructionSet, Isa, Job, on};
use super::lanes;
use super::rows_per_task;
use rayon::prelude::*;
use std::mem::MaybeUninit;

/// Partial sums of the squares: enough to hide the latency of an addition.
const LANES: usize = 64;

/// `out` becomes `weight · T(x / √(mean(x²) + eps))` for each row of `k`. What it held is gone.
///
/// # Panics
/// If `k` is 0 or a slice does not have the length that the sizes ask for.
pub fn rms_norm<T: Element>(
    set: InstructionSet,
    k: usize,
    x: &[T],
    weight: &[T],
    eps: f32,
    out: &mut Vec<T>,
) {
    check(k, x, weight);
    let rows = rows_per_task(k) * k;
    let task = |x: &[T], out: &mut [MaybeUninit<T>]| {
        let job = Rows {
            x,
            weight,
            eps,
            out,
        };
        on!(set, isa => isa.vectorize(job));
    };
    // SAFETY: tasks cover all rows, and each writes its own as a whole.
    unsafe {
        fill(out, x.len(), |out| match x.len() <= rows {
            true => task(x, out),
            false => {
                (x.par_chunks(rows).zip(out.par_chunks_mut(rows))).for_each(|(x, out)| task(x, out))
            }
        });
    }
}

/// As [`rms_norm`] of `sum = T(x + residual)`, of which both are wanted.
///
/// # Panics
/// If `k` is 0 or a slice does not have the length that the sizes ask for.
#[expect(clippy::too_many_arguments, reason = "three tensors in, two out")]
pub fn add_rms_norm<T: Element>(
    set: InstructionSet,
    k: usize,
    x: &[T],
    residual: &[T],
    weight: &[T],
    eps: f32,
    sum: &mut Vec<T>,
    out: &mut Vec<T>,
) {
    check(k, x, weight);
    assert_eq!(x.len(), residual.len(), "as much residual as x");
    let rows = rows_per_task(k) * k;
    let task = |x: &[T], residual: &[T], sum: &mut [MaybeUninit<T>], out: &mut [MaybeUninit<T>]| {
        let job = Sums {
            x,
            residual,
            weight,
            eps,
            sum,
            out,
        };
        on!(set, isa => isa.vectorize(job));
    };
    // SAFETY: tasks cover all rows, and each writes its own as a whole.
    unsafe {
        fill(sum, x.len(), |sum| {
            fill(out, x.len(), |out| match x.len() <= rows {
                true => task(x, residual, sum, out),
                false => x
                    .par_chunks(rows)
                    .zip(residual.par_chunks(rows))
                    .zip(sum.par_chunks_mut(rows))
                    .zip(out.par_chunks_mut(rows))
                    .for_each(|(((x, residual), sum), out)| task(x, residual, sum, out)),
            });
        });
    }
}

fn check<T>(k: usize, x: &[T], weight: &[T]) {
    assert!(k > 0, "rows are not empty");
    assert_eq!(x.len() % k, 0, "x is whole rows");
    assert_eq!(weight.len(), k, "one weight for each column");
}

struct Rows<'a, T> {
    x: &'a [T],
    weight: &'a [T],
    eps: f32,
    out: &'a mut [MaybeUninit<T>],
}

impl<T: Element> Job for Rows<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let k = self.weight.len();
        for (x, out) in self.x.chunks_exact(k).zip(self.out.chunks_exact_mut(k)) {
            normalize(x, self.weight, self.eps, out);
        }
    }
}

struct Sums<'a, T> {
    x: &'a [T],
    residual: &'a [T],
    weight: &'a [T],
    eps: f32,
    sum: &'a mut [MaybeUninit<T>],
    out: &'a mut [MaybeUninit<T>],
}

impl<T: Element> Job for Sums<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let k = self.weight.len();
        let rows = self.x.chunks_exact(k).zip(self.residual.chunks_exact(k));
        let outs = self.sum.chunks_exact_mut(k);
        for (((x, residual), sum), out) in rows.zip(outs).zip(self.out.chunks_exact_mut(k)) {
            for ((sum, x), residual) in sum.iter_mut().zip(x).zip(residual) {
                sum.write(T::from_f32(x.to_f32() + residual.to_f32()));
            }
            // SAFETY: the row has just been written.
            let sum = unsafe { sum.assume_init_ref() };
            normalize(sum, self.weight, self.eps, out);
        }
    }
}

#[inline(always)]
fn normalize<T: Element>(x: &[T], weight: &[T], eps: f32, out: &mut [MaybeUninit<T>]) {
    let mut squares = [0f32; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            squares[i] += chunk[i].to_f32() * chunk[i].to_f32();
        }
    }
    for (square, x) in squares.iter_mut().zip(rest) {
        *square += x.to_f32() * x.to_f32();
    }
    let mean = lanes::sum(squares) / x.len() as f32;
    let scale = 1.0 / (mean + eps).sqrt();
    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
        let quotient = T::from_f32(x.to_f32() * scale);
        out.write(T::from_f32(quotient.to_f32() * weight.to_f32()));
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Random, for_all_sets, same_bits};
    use super::*;
    use half::{bf16, f16};

    /// In f64, rounded where the definition says so.
    fn reference<T: Element>(k: usize, x: &[T], weight: &[T], eps: f64) -> Vec<f64> {
        let row = |x: &[T]| {
            let square = |x: &T| f64::from(x.to_f32()).powi(2);
            let mean = x.iter().map(square).sum::<f64>() / k as f64;
            let root = (mean + eps).sqrt();
            let values = x.iter().zip(weight).map(|(x, weight)| {
                let quotient = T::from_f32((f64::from(x.to_f32()) / root) as f32);
                f64::from(quotient.to_f32()) * f64::from(weight.to_f32())
            });
            values.collect::<Vec<_>>()
        };
        x.chunks(k).flat_map(row).collect()
    }

    /// `unit` is half the distance of neighbours of T: of the quotient, which may tip over to its neighbour, and of the
    /// result.
    fn agrees<T: Element>(unit: f64) {
        let sizes = [(1, 1), (3, 7), (5, 64), (2, 65), (2, 2048), (70, 1000)];
        for (rows, k) in sizes {
            let mut random = Random::new((rows * k) as u64);
            let x: Vec<T> = random.values(rows * k, 3.0);
            let residual: Vec<T> = random.values(rows * k, 3.0);
            let weight: Vec<T> = random.values(k, 2.0);
            let eps = 1e-5;
            let plain = for_all_sets(|set| {
                let mut out = vec![T::from_f32(f32::NAN); 3];
                rms_norm(set, k, &x, &weight, eps, &mut out);
                out
            });
            same_bits(&plain);
            let fused = for_all_sets(|set| {
                let mut sum = vec![T::from_f32(f32::NAN); 3];
                let mut out = sum.clone();
                add_rms_norm(set, k, &x, &residual, &weight, eps, &mut sum, &mut out);
                sum.extend(out);
                sum
            });
            same_bits(&fused);
            let sums: Vec<T> = (x.iter().zip(&residual))
                .map(|(x, residual)| T::from_f32(x.to_f32() + residual.to_f32()))
                .collect();
            let (found_sums, normed) = fused[0].split_at(rows * k);
            same_bits(&[sums.clone(), found_sums.to_vec()]);
            for (x, found) in [(&x[..], &plain[0][..]), (&sums, normed)] {
                let expected = reference(k, x, &weight, f64::from(eps));
                for (found, expected) in found.iter().zip(expected) {
                    let error = (f64::from(found.to_f32()) - expected).abs();
                    // Sums of 64 lanes: k / 64 + 6 roundings, halved by the root; four more on the way.
                    let f32_error = (k as f64 / 128.0 + 7.0) * 2f64.powi(-24);
                    let tips = if unit > 2f64.powi(-24) { 3.0 } else { 1.0 };
                    let bound = expected.abs() * (tips * unit + f32_error) + 1e-7;
                    assert!(
                        error <= bound,
                        "[{rows}, {k}]: {} for {expected}",
                        found.to_f32()
                    );
                }
            }
        }
    }

    #[test]
    fn agrees_with_f64_in_every_type() {
        agrees::<f32>(2f64.powi(-24));
        agrees::<bf16>(2f64.powi(-8));
        agrees::<f16>(2f64.powi(-11));
    }

    #[test]
    fn zeros_stay_zeros_and_nan_stays_in_its_row() {
        let mut x = vec![0f32; 3 * 70];
        x[75] = f32::NAN;
        for_all_sets(|set| {
            let mut out = vec![7f32; x.len()];
            rms_norm(set, 70, &x, &[1.0; 70], 1e-6, &mut out);
            assert!(out[..70].iter().chain(&out[140..]).all(|&y| y == 0.0));
            assert!(out[70..140].iter().all(|y| y.is_nan()));
        });
    }
}
