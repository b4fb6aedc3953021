//! Few rows of activations: the weight is read once from memory, and that is what it costs.

use super::rows::Rows;
use super::tasks::share;
use super::{Format, Product, Run, runs};
use crate::cpu::aligned::Aligned;
use crate::cpu::isa::{Isa, Job, Strip};
use std::marker::PhantomData;
use std::ops::Range;

/// Rows of operands up to which weights are widened in registers.
pub(super) const MOST: usize = 8;

/// Rows of operands that a widened weight is multiplied with before the next is read.
const AT_ONCE: usize = 8;

/// Bytes of weights of a task: enough to be worth handing out, few enough to share evenly and to stay in a core's
/// second cache when there are more rows than go at once.
const TASK: usize = 128 << 10;

/// Bytes of operands that all weights of a task pass by before the next are taken: they fit into a first cache, beside
/// the weights.
const NEAR: usize = 32 << 10;

pub(super) fn multiply<I: Isa, F: Format>(
    isa: I,
    rows: &Rows<'_>,
    block: usize,
    products: &[Product<'_, F>],
) {
    let near = NEAR / (rows.count().min(AT_ONCE) * size_of::<I::Operand>());
    let near = near / (4 * I::CHUNK) * (4 * I::CHUNK);
    let runs = runs(rows.k(), rows.scales().run, block, near);
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
        stretches: stretches::<I>(&runs, near),
        operands: &operands,
    };
    share(tasks.len(), Scratch::default, |scratch, task| {
        let (product, first) = tasks[task];
        let features = features.min(product.matrix.n - first);
        strips.multiply(product, first, features, scratch);
    });
}

/// Runs that are taken together.
struct Stretch<'a> {
    runs: &'a [Run],
    lengths: Vec<usize>,
    /// Where their operands start in a row of operands.
    offset: usize,
}

/// Stretches of about `near` elements, or of one run.
fn stretches<I: Isa>(runs: &[Run], near: usize) -> Vec<Stretch<'_>> {
    let mut stretches = Vec::new();
    let (mut rest, mut offset) = (runs, 0);
    while let [first, ..] = rest {
        let end = first.range.start + near;
        let count = rest.partition_point(|run| run.range.end <= end).max(1);
        let (these, others) = rest.split_at(count);
        let lengths: Vec<usize> = these.iter().map(|run| run.range.len()).collect();
        let padded = lengths.iter().map(|len| len.next_multiple_of(I::CHUNK));
        let next = offset + padded.sum::<usize>();
        stretches.push(Stretch {
            runs: these,
            lengths,
            offset,
        });
        (rest, offset) = (others, next);
    }
    stretches
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
    stretches: Vec<Stretch<'a>>,
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
        let (n, m) = (product.matrix.n, self.rows.count() / self.rows.planes());
        let totals = &mut scratch.totals;
        totals.clear();
        totals.resize(features * m, 0.0);
        for row in (0..self.rows.count()).step_by(AT_ONCE) {
            let rows = row..self.rows.count().min(row + AT_ONCE);
            for stretch in &self.stretches {
                self.add(product, first..first + features, &rows, stretch, scratch);
            }
        }
        for (feature, totals) in (first..).zip(scratch.totals.chunks_exact(m)) {
            let bias = product.bias(feature);
            for (row, total) in totals.iter().enumerate() {
                // SAFETY: inside `[m, n]`, and this task alone has this feature.
                unsafe { product.out.write(row * n + feature, total + bias) };
            }
        }
    }

    /// Adds what a stretch of K gives to the totals of some rows of operands.
    fn add<F: Format>(
        &self,
        product: &Product<'_, F>,
        features: Range<usize>,
        rows: &Range<usize>,
        stretch: &Stretch<'_>,
        scratch: &mut Scratch,
    ) {
        let Scratch {
            scales,
            sums,
            totals,
        } = scratch;
        let pitch = self.rows.k();
        scales.clear();
        for feature in features.clone() {
            for run in stretch.runs {
                let w_scale = product.scale(feature, run.block, pitch);
                let rows = rows.clone();
                scales.extend(rows.map(|row| self.rows.scale(row, run.group) * w_scale));
            }
        }
        sums.clear();
        sums.resize(features.len() * rows.len(), 0.0);
        let k: usize = stretch.lengths.iter().sum();
        let start = features.start * pitch + stretch.runs[0].range.start;
        let stride = self.operands.len() / self.rows.count();
        let strip = Strip {
            weights: &product.matrix.weights[start..][..(features.len() - 1) * pitch + k],
            pitch,
            k,
            x: &self.operands[rows.start * stride + stretch.offset..],
            stride,
            runs: &stretch.lengths,
            scales,
        };
        match rows.len() {
            1 => F::dot::<I, 1>(self.isa, &strip, sums),
            2 => F::dot::<I, 2>(self.isa, &strip, sums),
            3 => F::dot::<I, 3>(self.isa, &strip, sums),
            4 => F::dot::<I, 4>(self.isa, &strip, sums),
            5 => F::dot::<I, 5>(self.isa, &strip, sums),
            6 => F::dot::<I, 6>(self.isa, &strip, sums),
            7 => F::dot::<I, 7>(self.isa, &strip, sums),
            _ => F::dot::<I, AT_ONCE>(self.isa, &strip, sums),
        }
        let (planes, m) = (self.rows.planes(), totals.len() / features.len());
        let totals = totals.chunks_exact_mut(m);
        for (totals, sums) in totals.zip(sums.chunks_exact(rows.len())) {
            for (row, sum) in rows.clone().zip(sums) {
                totals[row / planes] += sum;
            }
        }
    }
}
