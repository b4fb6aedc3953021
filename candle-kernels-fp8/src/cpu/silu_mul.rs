//! `silu(gate) · up`, the inner activation of a gated MLP.
//!
//! Floor: two values read and one written, some 35 operations, one of them a division. The inner activations of a token
//! (8192) are 50 KiB in BF16 and one or two microseconds; those of a prompt of 512 tokens 24 MiB.

use super::element::Element;
use super::exp::exp;
use super::fill::fill;
use super::isa::{InstructionSet, Isa, Job, on};
use rayon::prelude::*;
use std::mem::MaybeUninit;

/// Elements of a task.
const TASK: usize = 1 << 15;

/// `out` becomes `T(gate / (1 + exp(-gate)) · up)`, computed in f32. What it held is gone.
///
/// # Panics
/// If `gate` and `up` differ in length.
pub fn silu_mul<T: Element>(set: InstructionSet, gate: &[T], up: &[T], out: &mut Vec<T>) {
    assert_eq!(gate.len(), up.len(), "as many gates as values");
    let task = |gate: &[T], up: &[T], out: &mut [MaybeUninit<T>]| {
        on!(set, isa => isa.vectorize(SiluMul { gate, up, out }));
    };
    // SAFETY: tasks cover all of the slice, and each writes its part as a whole.
    unsafe {
        fill(out, gate.len(), |out| match gate.len() <= TASK {
            true => task(gate, up, out),
            false => gate
                .par_chunks(TASK)
                .zip(up.par_chunks(TASK))
                .zip(out.par_chunks_mut(TASK))
                .for_each(|((gate, up), out)| task(gate, up, out)),
        });
    }
}

struct SiluMul<'a, T> {
    gate: &'a [T],
    up: &'a [T],
    out: &'a mut [MaybeUninit<T>],
}

impl<T: Element> Job for SiluMul<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for ((out, gate), up) in self.out.iter_mut().zip(self.gate).zip(self.up) {
            let gate = gate.to_f32();
            out.write(T::from_f32(gate / (1.0 + exp(-gate)) * up.to_f32()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Random, for_all_sets, same_bits};
    use super::*;
    use half::{bf16, f16};

    fn agrees<T: Element>(unit: f64) {
        for n in [0, 1, 7, 33, 1000, 2 * TASK + 5] {
            let mut random = Random::new(n as u64);
            let (gate, up): (Vec<T>, Vec<T>) = (random.values(n, 20.0), random.values(n, 3.0));
            let results = for_all_sets(|set| {
                let mut out = vec![T::from_f32(f32::NAN); 3];
                silu_mul(set, &gate, &up, &mut out);
                out
            });
            same_bits(&results);
            for ((found, gate), up) in results[0].iter().zip(&gate).zip(&up) {
                let (gate, up) = (f64::from(gate.to_f32()), f64::from(up.to_f32()));
                let expected = gate / (1.0 + (-gate).exp()) * up;
                let error = (f64::from(found.to_f32()) - expected).abs();
                // 2 ulp of exp, and a rounding each of the sum, the quotient, the product and the result.
                let bound = expected.abs() * (7.0 * 2f64.powi(-24) + unit) + 2f64.powi(-25);
                assert!(error <= bound, "silu({gate}) · {up} = {}", found.to_f32());
            }
        }
    }

    #[test]
    fn agrees_with_f64_in_every_type() {
        agrees::<f32>(0.0);
        agrees::<bf16>(2f64.powi(-8));
        agrees::<f16>(2f64.powi(-11));
    }

    #[test]
    fn far_from_zero() {
        let gate = [100.0, 1e30, f32::INFINITY, -100.0, -1e30, f32::NAN];
        for_all_sets(|set| {
            let mut out = vec![7f32; 6];
            silu_mul(set, &gate, &[2.0; 6], &mut out);
            assert_eq!(out[..3], [200.0, 2e30, f32::INFINITY]);
            assert!(out[3..5].iter().all(|&y| y == 0.0));
            assert!(out[5].is_nan());
        });
    }
}
