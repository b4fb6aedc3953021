//! Products of activations, quantized or not, with E4M3 weights.

use super::isa::{InstructionSet, on};
use super::matmul::{self, E4m3, Elements, Input, InputScales, Matrix};
use crate::ScaleLayout;

/// The activations of a [`ScaledMm`].
#[derive(Debug, Clone, Copy)]
pub enum Activations<'a> {
    /// As they are, `[m, k]`.
    Values(&'a [f32]),
    /// Quantized.
    Codes {
        /// E4M3, `[m, k]`.
        codes: &'a [u8],
        /// Of the shape that `scaling` says.
        scales: &'a [f32],
        /// Which activations share a scale.
        scaling: Scaling,
    },
}

/// Which activations `[m, k]` share a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scaling {
    /// All: scales `[1]`.
    Tensor,
    /// Those of a row: scales `[m, 1]`.
    Token,
    /// Groups of so many neighbours in a row (not 0; the last may be short): scales `[m, ceil(k / group)]`.
    Group(usize),
}

impl Scaling {
    /// The number of scales that activations `[m, k]` have.
    pub fn len(self, m: usize, k: usize) -> usize {
        match self {
            Self::Tensor => 1,
            Self::Token => m,
            Self::Group(group) => m * k.div_ceil(group),
        }
    }
}

/// An E4M3 weight `[n, k]`.
#[derive(Debug, Clone, Copy)]
pub struct Weight<'a> {
    /// Output features.
    pub n: usize,
    /// E4M3, `[n, k]`.
    pub codes: &'a [u8],
    /// As `layout` says.
    pub scales: &'a [f32],
    /// Layout of `scales`.
    pub layout: ScaleLayout,
    /// `[n]`.
    pub bias: Option<&'a [f32]>,
}

/// Products of activations `[m, k]` with the transposes of weights `[n, k]`.
#[derive(Debug, Clone, Copy)]
pub struct ScaledMm<'a> {
    /// Rows of activations.
    pub m: usize,
    /// Input features.
    pub k: usize,
    /// `[m, k]`.
    pub activations: Activations<'a>,
    /// One or more; the extent of a scale along K is the same in all of them.
    pub weights: &'a [Weight<'a>],
}

/// Computes the products: `outs[i]` becomes `[m, n]` of `weights[i]`. What the vectors held is gone.
///
/// Every sum over a run of K on which no scale changes is an f32 sum of exact products of two codes, or of a code and a
/// value, in parts of at least 512 terms or the whole run. A part is multiplied by the product of the two scales; parts
/// and bias are added in f32.
///
/// # Panics
/// If a slice does not have the length that the sizes ask for, there is not one vector for each weight, or scales of
/// the weights differ in their extent along K.
pub fn scaled_mm(set: InstructionSet, args: &ScaledMm<'_>, outs: &mut [Vec<f32>]) {
    let &ScaledMm {
        m,
        k,
        activations,
        weights,
    } = args;
    let matrices: Vec<Matrix<'_, E4m3>> = weights
        .iter()
        .map(|weight| {
            let Weight {
                n,
                codes,
                scales,
                layout,
                bias,
            } = *weight;
            assert_eq!(codes.len(), n * k, "a weight is [n, k]");
            assert_eq!(
                scales.len(),
                layout.len(n, k),
                "scales are as their layout says"
            );
            assert!(bias.is_none_or(|bias| bias.len() == n), "bias is [n]");
            Matrix {
                n,
                weights: codes,
                scales,
                layout,
                bias,
            }
        })
        .collect();
    let input = input(m, k, activations);
    on!(set, isa => matmul::matmul(isa, &input, &matrices, outs));
}

/// Unquantized activations `[m, k]`, which have no scales.
pub(super) fn full(m: usize, k: usize, values: &[f32]) -> Input<'_> {
    assert_eq!(values.len(), m * k, "activations are [m, k]");
    let scales = InputScales {
        scales: &[1.0],
        row: 0,
        group: 0,
        run: k,
    };
    Input {
        m,
        k,
        elements: Elements::Values(values),
        scales,
    }
}

fn input<'a>(m: usize, k: usize, activations: Activations<'a>) -> Input<'a> {
    let (codes, scales, scaling) = match activations {
        Activations::Values(values) => return full(m, k, values),
        Activations::Codes {
            codes,
            scales,
            scaling,
        } => (codes, scales, scaling),
    };
    assert_eq!(codes.len(), m * k, "activations are [m, k]");
    assert_eq!(
        scales.len(),
        scaling.len(m, k),
        "activation scales are as their scaling says"
    );
    let (row, group, run) = match scaling {
        Scaling::Tensor => (0, 0, k),
        Scaling::Token => (1, 0, k),
        Scaling::Group(group) => (k.div_ceil(group), 1, group),
    };
    let scales = InputScales {
        scales,
        row,
        group,
        run,
    };
    Input {
        m,
        k,
        elements: Elements::Codes(codes),
        scales,
    }
}
