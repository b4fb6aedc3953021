//! Many rows of activations: panels of widened weights, tiles of activations, as many products as the processor can.

use super::rows::Rows;
use super::tasks::share;
use super::{Format, Product, Run, runs};
use crate::cpu::isa::{Block, Isa, Job, Operand};
use rayon::prelude::*;
use std::ops::Range;

/// Longest run of K in a panel: with the widest panel (32 features in bf16) 32 KiB, two thirds of a first cache.
const DEEP: usize = 512;

/// Rows of operands that are packed at a time, which bounds what they take; weights are widened again for the next.
const BATCH: usize = 1536;

pub(super) fn multiply<I: Isa, F: Format>(
    isa: I,
    rows: &Rows<'_>,
    block: usize,
    products: &[Product<'_, F>],
) {
    let runs = runs(rows.k(), rows.scales().run, block, DEEP);
    // A row of activations is not torn apart: its planes are added where its first one was written.
    let batch = BATCH / rows.planes() * rows.planes();
    for first in (0..rows.count()).step_by(batch) {
        let batch = first..rows.count().min(first + batch);
        let tiles = Tiles::new(isa, rows, batch, &runs);
        let panels: Vec<(&Product<'_, F>, usize)> = products
            .iter()
            .flat_map(|product| {
                (0..product.matrix.n)
                    .step_by(I::FEATURES)
                    .map(move |first| (product, first))
            })
            .collect();
        share(panels.len(), Scratch::new::<I>, |scratch, task| {
            let (product, first) = panels[task];
            isa.vectorize(Panel {
                isa,
                rows,
                runs: &runs,
                tiles: &tiles,
                product,
                first,
                scratch,
            });
        });
    }
}

/// Operands of a batch of rows, in tiles of nearly equal height. A tile is, for each run, `[groups][height][DEPTH]`.
struct Tiles<O> {
    operands: Vec<O>,
    /// Rows of each tile.
    heights: Vec<Range<usize>>,
    /// Operands of a row, runs padded to whole groups.
    stride: usize,
}

impl<O: Operand> Tiles<O> {
    fn new<I: Isa<Operand = O>>(
        isa: I,
        rows: &Rows<'_>,
        batch: Range<usize>,
        runs: &[Run],
    ) -> Self {
        let stride = runs
            .iter()
            .map(|run| run.range.len().next_multiple_of(I::DEPTH))
            .sum();
        let count = batch.len().div_ceil(I::ROWS);
        let edge = |i: usize| batch.start + batch.len() * i / count;
        let heights: Vec<Range<usize>> = (0..count).map(|i| edge(i)..edge(i + 1)).collect();
        let mut operands = vec![O::default(); batch.len() * stride];
        let mut rest = &mut operands[..];
        let mut parts = Vec::with_capacity(count);
        for tile in &heights {
            let (part, others) = rest.split_at_mut(tile.len() * stride);
            parts.push((tile.clone(), part));
            rest = others;
        }
        let row = || vec![O::default(); rows.k()];
        parts
            .into_par_iter()
            .for_each_init(row, |row, (heights, tile)| {
                isa.vectorize(PackTile::<I> {
                    rows,
                    heights,
                    runs,
                    row,
                    tile,
                });
            });
        Self {
            operands,
            heights,
            stride,
        }
    }
}

struct PackTile<'a, I: Isa> {
    rows: &'a Rows<'a>,
    heights: Range<usize>,
    runs: &'a [Run],
    row: &'a mut [I::Operand],
    tile: &'a mut [I::Operand],
}

impl<I: Isa> Job for PackTile<'_, I> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let height = self.heights.len();
        for (r, index) in self.heights.enumerate() {
            self.rows.write(index, self.row);
            let mut tile = &mut self.tile[..];
            for run in self.runs {
                let len = run.range.len().next_multiple_of(I::DEPTH);
                let (this, rest) = tile.split_at_mut(len * height);
                let groups = this.chunks_exact_mut(height * I::DEPTH);
                let from = self.row[run.range.clone()].chunks(I::DEPTH);
                for (group, from) in groups.zip(from) {
                    group[r * I::DEPTH..][..from.len()].copy_from_slice(from);
                }
                tile = rest;
            }
        }
    }
}

/// What a thread needs beside its output.
struct Scratch<O> {
    panel: Vec<O>,
    sums: Vec<f32>,
    scales: Vec<f32>,
}

impl<O: Default + Clone> Scratch<O> {
    fn new<I: Isa<Operand = O>>() -> Self {
        Self {
            panel: vec![O::default(); DEEP.next_multiple_of(I::DEPTH) * I::FEATURES],
            sums: vec![0.0; I::ROWS * I::FEATURES],
            scales: vec![0.0; I::FEATURES],
        }
    }
}

/// Up to `FEATURES` output features from `first` on, for all rows of the tiles.
struct Panel<'a, I: Isa, F: Format> {
    isa: I,
    rows: &'a Rows<'a>,
    runs: &'a [Run],
    tiles: &'a Tiles<I::Operand>,
    product: &'a Product<'a, F>,
    first: usize,
    scratch: &'a mut Scratch<I::Operand>,
}

impl<I: Isa, F: Format> Job for Panel<'_, I, F> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self {
            isa,
            rows,
            runs,
            tiles,
            product,
            first,
            scratch,
        } = self;
        let (n, k) = (product.matrix.n, rows.k());
        let features = I::FEATURES.min(n - first);
        let planes = rows.planes();
        let mut offset = 0;
        for (index, run) in runs.iter().enumerate() {
            let len = run.range.len();
            let padded = len.next_multiple_of(I::DEPTH);
            let panel = &mut scratch.panel[..padded * I::FEATURES];
            let block = Block {
                weights: &product.matrix.weights[first * k + run.range.start..],
                stride: k,
                features,
                len,
            };
            F::pack(isa, &block, panel);
            for (scale, feature) in scratch.scales.iter_mut().zip(first..first + features) {
                *scale = product.scale(feature, run.block, k);
            }
            let mut start = 0;
            for tile in &tiles.heights {
                let height = tile.len();
                let a =
                    &tiles.operands[start * tiles.stride + height * offset..][..height * padded];
                isa.tile(height, a, panel, &mut scratch.sums);
                for (row, sums) in tile.clone().zip(scratch.sums.chunks_exact(I::FEATURES)) {
                    let x_scale = rows.scale(row, run.group);
                    let at = row / planes * n + first;
                    let is_first = index == 0 && row % planes == 0;
                    let scaled = sums[..features].iter().zip(&scratch.scales);
                    for (f, (sum, w_scale)) in scaled.enumerate() {
                        let y = sum * (x_scale * w_scale);
                        // SAFETY: inside `[m, n]`, this task alone has these features, and the first run of the first
                        // plane wrote where the others add.
                        unsafe {
                            match is_first {
                                true => product.out.write(at + f, y + product.bias(first + f)),
                                false => product.out.add(at + f, y),
                            }
                        }
                    }
                }
                start += height;
            }
            offset += padded;
        }
    }
}
