//! `y[m, n] = Σ_runs (x_scale · w_scale) · Σ_k x[m, k] · w[n, k]  + bias[n]`, in f32, for weights in E4M3 and BF16.
//!
//! A run is a stretch of K on which both scales are constant. Few rows of activations: each weight is widened on its way
//! through the registers (`few_rows.rs`). Many: panels of the weight are widened once and multiplied with tiles of the
//! activations (`many_rows.rs`). Weights stay as they are; what is widened at a time fits into a core's first cache.

mod few_rows;
mod many_rows;
mod rows;
mod tasks;

pub use tasks::in_pool;
pub(super) use tasks::share;

use super::isa::{Block, Isa, Strip};
use crate::ScaleLayout;
use half::bf16;
use rows::Rows;
use std::mem::MaybeUninit;
use std::ops::Range;

/// How a weight is stored.
pub(super) trait Format: Copy + Send + Sync {
    /// One weight.
    type Weight: Copy + Send + Sync;

    /// The instruction set's dot products for this format.
    fn dot<I: Isa, const M: usize>(
        isa: I,
        strip: &Strip<'_, Self::Weight, I::Operand>,
        out: &mut [f32],
    );

    /// The instruction set's panel of this format.
    fn pack<I: Isa>(isa: I, block: &Block<'_, Self::Weight>, panel: &mut [I::Operand]);
}

/// E4M3 codes.
#[derive(Clone, Copy)]
pub(super) struct E4m3;

impl Format for E4m3 {
    type Weight = u8;

    fn dot<I: Isa, const M: usize>(isa: I, strip: &Strip<'_, u8, I::Operand>, out: &mut [f32]) {
        isa.dot_e4m3::<M>(strip, out);
    }

    fn pack<I: Isa>(isa: I, block: &Block<'_, u8>, panel: &mut [I::Operand]) {
        isa.pack_e4m3(block, panel);
    }
}

/// BF16 values.
#[derive(Clone, Copy)]
pub(super) struct Bf16;

impl Format for Bf16 {
    type Weight = bf16;

    fn dot<I: Isa, const M: usize>(isa: I, strip: &Strip<'_, bf16, I::Operand>, out: &mut [f32]) {
        isa.dot_bf16::<M>(strip, out);
    }

    fn pack<I: Isa>(isa: I, block: &Block<'_, bf16>, panel: &mut [I::Operand]) {
        isa.pack_bf16(block, panel);
    }
}

/// A weight `[n, k]`, its scales and bias.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a, F: Format> {
    pub(super) n: usize,
    pub(super) weights: &'a [F::Weight],
    pub(super) scales: &'a [f32],
    pub(super) layout: ScaleLayout,
    pub(super) bias: Option<&'a [f32]>,
}

/// Activations `[m, k]`.
#[derive(Clone, Copy)]
pub(super) struct Input<'a> {
    pub(super) m: usize,
    pub(super) k: usize,
    pub(super) elements: Elements<'a>,
    pub(super) scales: InputScales<'a>,
}

#[derive(Clone, Copy)]
pub(super) enum Elements<'a> {
    Values(&'a [f32]),
    Codes(&'a [u8]),
}

/// The scale of activation row `m` in group `g` is `scales[m * row + g * group]`; a group is `run` neighbours.
#[derive(Clone, Copy)]
pub(super) struct InputScales<'a> {
    pub(super) scales: &'a [f32],
    pub(super) row: usize,
    pub(super) group: usize,
    pub(super) run: usize,
}

/// A stretch of K on which no scale changes.
#[derive(Debug, Clone)]
struct Run {
    range: Range<usize>,
    /// Index of the activations' scale in a row.
    group: usize,
    /// Index of the weight's scale in a row.
    block: usize,
}

/// The stretches of K, none of them longer than `longest`.
fn runs(k: usize, group: usize, block: usize, longest: usize) -> Vec<Run> {
    let mut runs = Vec::new();
    let mut start = 0;
    while start < k {
        let (g, b) = (start / group, start / block);
        let end = (g + 1)
            .saturating_mul(group)
            .min((b + 1).saturating_mul(block));
        let end = end.min(k).min(start.saturating_add(longest));
        runs.push(Run {
            range: start..end,
            group: g,
            block: b,
        });
        start = end;
    }
    runs
}

/// Multiplies the input with each matrix: `outs[i]` becomes `[m, n_i]`.
///
/// The caller has checked all lengths. The matrices' scales have the same extent along K.
pub(super) fn matmul<I: Isa, F: Format>(
    isa: I,
    input: &Input<'_>,
    matrices: &[Matrix<'_, F>],
    outs: &mut [Vec<f32>],
) {
    let Some(block) = matrices.first().map(|matrix| matrix.layout.run(input.k)) else {
        return;
    };
    assert!(
        matrices
            .iter()
            .all(|matrix| matrix.layout.run(input.k) == block),
        "scales of weights that share their input have the same extent along K"
    );
    assert_eq!(matrices.len(), outs.len(), "one result for each weight");
    let products: Vec<Product<'_, F>> = matrices
        .iter()
        .zip(outs.iter_mut())
        .map(|(&matrix, out)| {
            out.clear();
            out.reserve_exact(input.m * matrix.n);
            let out = Out(out.spare_capacity_mut().as_mut_ptr());
            Product { matrix, out }
        })
        .collect();
    if input.m > 0 {
        let rows = Rows::new(isa, input);
        if rows.count() <= few_rows::MOST {
            few_rows::multiply(isa, &rows, block, &products);
        } else {
            many_rows::multiply(isa, &rows, block, &products);
        }
    }
    for (matrix, out) in matrices.iter().zip(outs) {
        // SAFETY: so much was reserved, and each element of `[m, n]` was written, by the task of its output feature.
        unsafe { out.set_len(input.m * matrix.n) };
    }
}

/// A matrix and where its product goes.
struct Product<'a, F: Format> {
    matrix: Matrix<'a, F>,
    out: Out,
}

impl<F: Format> Product<'_, F> {
    /// The scale of output feature `n` in a block of K.
    fn scale(&self, n: usize, block: usize, k: usize) -> f32 {
        self.matrix.layout.row(self.matrix.scales, n, k).scales[block]
    }

    /// The scales of the output features from `first` on in a run of K.
    #[inline(always)]
    fn fill_scales(&self, scales: &mut [f32], first: usize, run: &Run, k: usize) {
        for (scale, feature) in scales.iter_mut().zip(first..self.matrix.n) {
            *scale = self.scale(feature, run.block, k);
        }
    }

    fn bias(&self, n: usize) -> f32 {
        self.matrix.bias.map_or(0.0, |bias| bias[n])
    }
}

/// `[m, n]` in memory that is not initialized. Tasks write to different columns of it.
#[derive(Clone, Copy)]
struct Out(*mut MaybeUninit<f32>);

// SAFETY: it is a place to write to, and `write` is unsafe.
unsafe impl Send for Out {}
// SAFETY: as above.
unsafe impl Sync for Out {}

impl Out {
    /// # Safety
    /// `at` is inside, and no other thread touches it.
    #[inline(always)]
    unsafe fn write(self, at: usize, value: f32) {
        // SAFETY: as the caller says.
        unsafe { (*self.0.add(at)).write(value) };
    }

    /// `len` elements from `at` on.
    ///
    /// # Safety
    /// They are inside, and no other thread touches them as long as the slice lives.
    #[inline(always)]
    unsafe fn row<'a>(self, at: usize, len: usize) -> &'a mut [MaybeUninit<f32>] {
        // SAFETY: as the caller says.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(at), len) }
    }
}
