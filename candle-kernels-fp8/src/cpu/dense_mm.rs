//! Products of activations with BF16 weights: the linears that a checkpoint leaves dense.

use super::isa::{InstructionSet, on};
use super::matmul::{self, Bf16, Matrix};
use super::scaled_mm::full;
use crate::ScaleLayout;
use half::bf16;

/// Computes activations `[m, k]` times the transpose of a BF16 weight `[n, k]`, plus a bias `[n]`: `out` becomes
/// `[m, n]`. What the vector held is gone.
///
/// Products are exact, or rounded once, and added in f32: the weight is never rounded to fewer bits, nor are the
/// activations.
///
/// # Panics
/// If a slice does not have the length that the sizes ask for.
pub fn dense_mm(
    set: InstructionSet,
    (m, n, k): (usize, usize, usize),
    x: &[f32],
    weight: &[bf16],
    bias: Option<&[f32]>,
    out: &mut Vec<f32>,
) {
    assert_eq!(weight.len(), n * k, "weight is [n, k]");
    assert!(bias.is_none_or(|bias| bias.len() == n), "bias is [n]");
    let matrix = Matrix::<Bf16> {
        n,
        weights: weight,
        scales: &[1.0],
        layout: ScaleLayout::Tensor,
        bias,
    };
    let input = full(m, k, x);
    on!(set, isa => matmul::matmul(isa, &input, &[matrix], std::slice::from_mut(out)));
}
