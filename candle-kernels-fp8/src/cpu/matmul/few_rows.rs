//! Few rows of activations: the weight is read once from memory, and that is what it costs.

use super::rows::Rows;
use super::tasks::share;
use super::{Format, Product, Run, runs};
use crate::cpu::aligned::Aligned;
use crate::cpu::isa::{Isa, Job, Strip};
use std::marker::PhantomData;

/// Rows of operands up to which weights are widened in registers.
pub(super) const MOST: usize = 8;

/// Rows of operands that a widened weight is multiplied with before the next is read.
const AT_ONCE: usize = 8;

/// Bytes of weights of a task: enough to be worth handing out, few enough to share evenly and to stay in a core's
/// second cache when there are more rows than go at once.
const TASK: usize = 128 << 10;

pub(super) fn multiply<I: Isa, F: Format>(
    isa: I,
    rows: &Rows<'_>,
    block: usize,
    products: &[Product<'_, F>],
) {
    let runs = runs(rows.k(), rows.scales().run, block, usize::MAX);
    let lengths: Vec<usize> = runs.iter().map(|run| run.range.len()).collect();
    let operands = isa.vectorize(Operands::<I> {
        rows,
        runs: &runs,
        isa: PhantomData,
    });

    let features = (TASK / (rows.k() * size_of::<F::Weight>())).max(1);
    let tasks: Vec<(&Product<'_, F>, usize)> = products
        .iter()
        .flat_map(|product| {
            (0..product.matrix.n)
                .step_by(features)
                .map(move |first| (product, first))
        })
        .collect();
    let strips = Strips {
        isa,
        rows,
        runs: &runs,
        lengths: &lengths,
        operands: &operands,
    };
    share(tasks.len(), Scratch::default, |scratch, task| {
        let (product, first) = tasks[task];
        let features = features.min(product.matrix.n - first);
        strips.multiply(product, first, features, scratch);
    });
}

/// Makes the operands of all rows, each run padded with zeros to whole chunks: `[rows, stride]`.
struct Operands<'a, I> {
    rows: &'a Rows<'a>,
    runs: &'a [Run],
    isa: PhantomData<I>,
}

impl<I: Isa> Job for Operands<'_, I> {
    type Output = Aligned<I::Operand>;

    #[inline(always)]
    fn run(self) -> Aligned<I::Operand> {
        let Self { rows, runs, .. } = self;
        let padded = |run: &Run| run.range.len().next_multiple_of(I::CHUNK);
        let stride = runs.iter().map(padded).sum();
        let mut operands = Aligned::filled(I::Operand::default(), rows.count() * stride);
        if let [_] = runs {
            for (row, out) in operands.chunks_exact_mut(stride).enumerate() {
                rows.write(row, &mut out[..rows.k()]);
            }
            return operands;
        }
        let mut whole = vec![I::Operand::default(); rows.k()];
        for (row, mut out) in operands.chunks_exact_mut(stride).enumerate() {
            rows.write(row, &mut whole);
            for run in runs {
                let (this, rest) = out.split_at_mut(padded(run));
                this[..run.range.len()].copy_from_slice(&whole[run.range.clone()]);
                out = rest;
            }
        }
        operands
    }
}

#[derive(Default)]
struct Scratch {
    /// `[features][runs][rows at once]`
    scales: Vec<f32>,
    /// `[features][rows at once]`
    sums: Vec<f32>,
    /// `[features][m]`
    totals: Vec<f32>,
}

struct Strips<'a, I: Isa> {
    isa: I,
    rows: &'a Rows<'a>,
    runs: &'a [Run],
    lengths: &'a [usize],
    operands: &'a [I::Operand],
}

impl<I: Isa> Strips<'_, I> {
    /// `features` output features from `first` on, for all rows.
    fn multiply<F: Format>(
        &self,
        product: &Product<'_, F>,
        first: usize,
        features: usize,
        scratch: &mut Scratch,
    ) {
        let (n, k) = (product.matrix.n, self.rows.k());
        let count = self.rows.count();
        let planes = self.rows.planes();
        let m = count / planes;
        let stride = self.operands.len() / count;
        let weights = &product.matrix.weights[first * k..][..features * k];
        let Scratch {
            scales,
            sums,
            totals,
        } = scratch;
        totals.clear();
        totals.resize(features * m, 0.0);
        for row in (0..count).step_by(AT_ONCE) {
            let at_once = AT_ONCE.min(count - row);
            scales.clear();
            for feature in first..first + features {
                for run in self.runs {
                    let w_scale = product.scale(feature, run.block, k);
                    scales.extend(
                        (row..row + at_once).map(|row| self.rows.scale(row, run.group) * w_scale),
                    );
                }
            }
            sums.resize(features * at_once, 0.0);
            let strip = Strip {
                weights,
                k,
                x: &self.operands[row * stride..],
                stride,
                runs: self.lengths,
                scales,
            };
            match at_once {
                1 => F::dot::<I, 1>(self.isa, &strip, sums),
                2 => F::dot::<I, 2>(self.isa, &strip, sums),
                3 => F::dot::<I, 3>(self.isa, &strip, sums),
                4 => F::dot::<I, 4>(self.isa, &strip, sums),
                5 => F::dot::<I, 5>(self.isa, &strip, sums),
                6 => F::dot::<I, 6>(self.isa, &strip, sums),
                7 => F::dot::<I, 7>(self.isa, &strip, sums),
                _ => F::dot::<I, AT_ONCE>(self.isa, &strip, sums),
            }
            for (totals, sums) in totals.chunks_exact_mut(m).zip(sums.chunks_exact(at_once)) {
                for (row, sum) in (row..).zip(sums) {
                    totals[row / planes] += sum;
                }
            }
        }
        for (feature, totals) in (first..).zip(totals.chunks_exact(m)) {
            let bias = product.bias(feature);
            for (row, total) in totals.iter().enumerate() {
                // SAFETY: inside `[m, n]`, and this task alone has this feature.
                unsafe { product.out.write(row * n + feature, total + bias) };
            }
        }
    }
}
