//! Many rows of activations: panels of widened weights, tiles of activations, as many products as the processor can.

use super::rows::Rows;
use super::tasks::share;
use super::{Format, Product, Run, runs};
use crate::cpu::aligned::Aligned;
use crate::cpu::isa::{Block, Isa, Job, Operand};
use rayon::prelude::*;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Longest run of K in a panel: with the widest panel (32 features in bf16) 32 KiB, two thirds of a first cache.
const DEEP: usize = 512;

/// Bytes of weights of a task.
const TASK: usize = 256 << 10;

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
        let span = span::<I, F>(rows.k(), products);
        let tasks: Vec<(&Product<'_, F>, Range<usize>)> = products
            .iter()
            .flat_map(|product| {
                let n = product.matrix.n;
                let features = move |first| first..n.min(first + span);
                (0..n)
                    .step_by(span)
                    .map(move |first| (product, features(first)))
            })
            .collect();
        share(tasks.len(), Scratch::new::<I>, |scratch, task| {
            let (product, features) = &tasks[task];
            isa.vectorize(Panels {
                isa,
                rows,
                runs: &runs,
                tiles: &tiles,
                product,
                features: features.clone(),
                scratch,
            });
        });
    }
}

/// Output features of a task: several panels, as the next one can be fetched while this one is multiplied.
fn span<I: Isa, F: Format>(k: usize, products: &[Product<'_, F>]) -> usize {
    let features: usize = products.iter().map(|product| product.matrix.n).sum();
    let enough = TASK / (k * size_of::<F::Weight>()).max(1);
    // A few tasks for each thread, so that they end at about the same time.
    let fair = features / (4 * rayon::current_num_threads());
    enough
        .min(fair)
        .next_multiple_of(I::FEATURES)
        .max(I::FEATURES)
}

/// Operands of a batch of rows, in tiles of nearly equal height. A tile is, for each run, `[groups][height][DEPTH]`.
struct Tiles<O> {
    operands: Aligned<O>,
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
        let pack = |mut memory: &mut [MaybeUninit<O>]| {
            let mut parts = Vec::with_capacity(count);
            for heights in &heights {
                let (tile, rest) = memory.split_at_mut(heights.len() * stride);
                parts.push((heights.clone(), tile));
                memory = rest;
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
        };
        // SAFETY: the tiles are all of the memory, and each writes all of its operands.
        let operands = unsafe { Aligned::written(batch.len() * stride, pack) };
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
    tile: &'a mut [MaybeUninit<I::Operand>],
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
                let mut groups = groups.map(|group| &mut group[r * I::DEPTH..][..I::DEPTH]);
                let mut from = self.row[run.range.clone()].chunks_exact(I::DEPTH);
                for (from, group) in from.by_ref().zip(groups.by_ref()) {
                    for (operand, value) in group.iter_mut().zip(from) {
                        operand.write(*value);
                    }
                }
                // A last group that is not full.
                let mut from = from.remainder().iter();
                for operand in groups.next().unwrap_or_default() {
                    operand.write(from.next().copied().unwrap_or_default());
                }
                tile = rest;
            }
        }
    }
}

/// What a thread needs beside its output.
struct Scratch<O> {
    panel: Aligned<O>,
    sums: Aligned<f32>,
    scales: Vec<f32>,
    biases: Vec<f32>,
}

impl<O: Operand> Scratch<O> {
    fn new<I: Isa<Operand = O>>() -> Self {
        Self {
            panel: Aligned::filled(O::default(), DEEP * I::FEATURES),
            sums: Aligned::filled(0.0, I::ROWS * I::FEATURES),
            scales: vec![0.0; I::FEATURES],
            biases: vec![0.0; I::FEATURES],
        }
    }
}

/// Output features of a matrix for all rows of the tiles, panel by panel.
struct Panels<'a, I: Isa, F: Format> {
    isa: I,
    rows: &'a Rows<'a>,
    runs: &'a [Run],
    tiles: &'a Tiles<I::Operand>,
    product: &'a Product<'a, F>,
    features: Range<usize>,
    scratch: &'a mut Scratch<I::Operand>,
}

impl<I: Isa, F: Format> Job for Panels<'_, I, F> {
    type Output = ();

    #[inline(always)]
    fn run(mut self) {
        self.block(self.features.start, 0).prefetch(self.isa);
        for first in self.features.clone().step_by(I::FEATURES) {
            self.panel(first);
        }
    }
}

impl<'a, I: Isa, F: Format> Panels<'a, I, F> {
    /// Of the panel that starts at feature `first`, what lies in a run of K.
    #[inline(always)]
    fn block(&self, first: usize, run: usize) -> Block<'a, F::Weight> {
        let (k, range) = (self.rows.k(), &self.runs[run].range);
        Block {
            weights: &self.product.matrix.weights[first * k + range.start..],
            stride: k,
            features: I::FEATURES.min(self.features.end - first),
            len: range.len(),
        }
    }

    /// The block that is packed after this one.
    #[inline(always)]
    fn next(&self, first: usize, run: usize) -> Option<Block<'a, F::Weight>> {
        let next_panel = first + I::FEATURES;
        if run + 1 < self.runs.len() {
            Some(self.block(first, run + 1))
        } else if next_panel < self.features.end {
            Some(self.block(next_panel, 0))
        } else {
            None
        }
    }

    /// Up to `FEATURES` output features from `first` on.
    #[inline(always)]
    fn panel(&mut self, first: usize) {
        let (n, k) = (self.product.matrix.n, self.rows.k());
        let features = first..self.features.end.min(first + I::FEATURES);
        let planes = self.rows.planes();
        for (bias, feature) in self.scratch.biases.iter_mut().zip(features.clone()) {
            *bias = self.product.bias(feature);
        }
        let mut offset = 0;
        for (index, run) in self.runs.iter().enumerate() {
            let block = self.block(first, index);
            let padded = block.len.next_multiple_of(I::DEPTH);
            let next = self.next(first, index);
            let Scratch {
                panel,
                sums,
                scales,
                biases,
            } = &mut *self.scratch;
            let panel = &mut panel[..padded * I::FEATURES];
            F::pack(self.isa, &block, panel);
            if let Some(next) = next {
                next.prefetch(self.isa);
            }
            for (scale, feature) in scales.iter_mut().zip(features.clone()) {
                *scale = self.product.scale(feature, run.block, k);
            }
            let mut start = 0;
            for tile in &self.tiles.heights {
                let height = tile.len();
                let a = start * self.tiles.stride + height * offset;
                let a = &self.tiles.operands[a..][..height * padded];
                self.isa.tile(height, a, panel, sums);
                for (row, sums) in tile.clone().zip(sums.chunks_exact(I::FEATURES)) {
                    let x_scale = self.rows.scale(row, run.group);
                    let at = row / planes * n + first;
                    // SAFETY: inside `[m, n]`, and this task alone has these features.
                    let out = unsafe { self.product.out.row(at, features.len()) };
                    let scaled = sums.iter().zip(scales.iter());
                    let scaled = scaled.map(|(sum, w_scale)| sum * (x_scale * w_scale));
                    if index == 0 && row % planes == 0 {
                        for ((out, y), bias) in out.iter_mut().zip(scaled).zip(biases.iter()) {
                            out.write(y + bias);
                        }
                    } else {
                        for (out, y) in out.iter_mut().zip(scaled) {
                            // SAFETY: the first run of the first plane wrote it.
                            unsafe { *out.assume_init_mut() += y };
                        }
                    }
                }
                start += height;
            }
            offset += padded;
        }
    }
}
