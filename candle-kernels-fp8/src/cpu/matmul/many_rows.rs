//! Many rows of activations: panels of widened weights, tiles of activations, as many products as the processor can.

use super::rows::Rows;
use super::tasks::share;
use super::{Format, Product, Run, runs};
use crate::cpu::aligned::Aligned;
use crate::cpu::isa::{Block, Isa, Job, Operand};
use rayon::prelude::*;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Longest run of K in a panel: with the widest panel and the tallest tile (32 features, 12 rows, in bf16) 33 KiB, which
/// fit into a first cache of 48 KiB.
const DEEP: usize = 384;

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
        let tiles = Tiles::new(isa, rows, batch.clone(), &runs);
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
        let scratch = || Scratch::new::<I>(batch.len());
        share(tasks.len(), scratch, |scratch, task| {
            let (product, features) = &tasks[task];
            isa.vectorize(Panels {
                isa,
                rows,
                runs: &runs,
                tiles: &tiles,
                batch: batch.clone(),
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

/// Operands of a batch of rows, in tiles of nearly equal height. For each run, for each tile: `[groups][height][DEPTH]`.
/// What a panel meets lies together: apart, tiles would fall into the same places of a cache.
struct Tiles<O> {
    operands: Aligned<O>,
    /// Rows of each tile.
    heights: Vec<Range<usize>>,
}

impl<O: Operand> Tiles<O> {
    fn new<I: Isa<Operand = O>>(
        isa: I,
        rows: &Rows<'_>,
        batch: Range<usize>,
        runs: &[Run],
    ) -> Self {
        let stride: usize = runs
            .iter()
            .map(|run| run.range.len().next_multiple_of(I::DEPTH))
            .sum();
        let count = batch.len().div_ceil(I::ROWS);
        let edge = |i: usize| batch.start + batch.len() * i / count;
        let heights: Vec<Range<usize>> = (0..count).map(|i| edge(i)..edge(i + 1)).collect();
        let pack = |mut memory: &mut [MaybeUninit<O>]| {
            let mut parts: Vec<_> = heights
                .iter()
                .map(|heights| (heights.clone(), Vec::new()))
                .collect();
            for run in runs {
                for (heights, tile) in &mut parts {
                    let len = heights.len() * run.range.len().next_multiple_of(I::DEPTH);
                    let (part, rest) = memory.split_at_mut(len);
                    tile.push(part);
                    memory = rest;
                }
            }
            let row = || vec![O::default(); rows.k()];
            parts
                .into_par_iter()
                .for_each_init(row, |row, (heights, mut tile)| {
                    isa.vectorize(PackTile::<I> {
                        rows,
                        heights,
                        runs,
                        row,
                        tile: &mut tile,
                    });
                });
        };
        // SAFETY: the tiles are all of the memory, and each writes all of its operands.
        let operands = unsafe { Aligned::written(batch.len() * stride, pack) };
        Self { operands, heights }
    }
}

struct PackTile<'a, 'b, I: Isa> {
    rows: &'a Rows<'a>,
    heights: Range<usize>,
    runs: &'a [Run],
    row: &'a mut [I::Operand],
    /// The part of each run.
    tile: &'a mut [&'b mut [MaybeUninit<I::Operand>]],
}

impl<I: Isa> Job for PackTile<'_, '_, I> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let height = self.heights.len();
        for (r, index) in self.heights.enumerate() {
            self.rows.write(index, self.row);
            for (run, part) in self.runs.iter().zip(self.tile.iter_mut()) {
                let groups = part.chunks_exact_mut(height * I::DEPTH);
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
            }
        }
    }
}

/// What a thread needs beside its output.
struct Scratch<O> {
    panel: Aligned<O>,
    /// Of a tile with a panel.
    products: Aligned<f32>,
    /// Of a panel's features.
    scales: Vec<f32>,
    biases: Vec<f32>,
    /// Of all rows with a panel, `[rows, FEATURES]`. In the result itself rows may lie a power of two apart, where they
    /// push each other out of a cache.
    sums: Aligned<f32>,
}

impl<O: Operand> Scratch<O> {
    fn new<I: Isa<Operand = O>>(rows: usize) -> Self {
        Self {
            panel: Aligned::filled(O::default(), DEEP * I::FEATURES),
            products: Aligned::filled(0.0, I::ROWS * I::FEATURES),
            scales: vec![0.0; I::FEATURES],
            biases: vec![0.0; I::FEATURES],
            sums: Aligned::filled(0.0, rows * I::FEATURES),
        }
    }
}

/// Output features of a matrix for all rows of the tiles, panel by panel.
struct Panels<'a, I: Isa, F: Format> {
    isa: I,
    rows: &'a Rows<'a>,
    runs: &'a [Run],
    tiles: &'a Tiles<I::Operand>,
    /// The rows of operands in the tiles.
    batch: Range<usize>,
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
            let mut offset = 0;
            for (run, Run { range, .. }) in self.runs.iter().enumerate() {
                self.add(first, run, offset);
                offset += self.batch.len() * range.len().next_multiple_of(I::DEPTH);
            }
            self.write(first);
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

    /// Adds the products over one run, whose tiles start at `offset`, of the output features from `first` on.
    #[inline(always)]
    fn add(&mut self, first: usize, run: usize, offset: usize) {
        let block = self.block(first, run);
        let padded = block.len.next_multiple_of(I::DEPTH);
        let next = self.next(first, run);
        let whole = self.is_whole();
        let Scratch {
            panel,
            products,
            scales,
            sums,
            ..
        } = &mut *self.scratch;
        let panel = &mut panel[..padded * I::FEATURES];
        F::pack(self.isa, &block, panel);
        if let Some(next) = next {
            next.prefetch(self.isa);
        }
        if !whole {
            self.product
                .fill_scales(scales, first, &self.runs[run], self.rows.k());
        }
        let mut operands = &self.tiles.operands[offset..];
        let mut sums = &mut sums[..];
        for tile in &self.tiles.heights {
            let (a, rest) = operands.split_at(tile.len() * padded);
            operands = rest;
            let (tile_sums, rest) = sums.split_at_mut(tile.len() * I::FEATURES);
            sums = rest;
            if whole {
                self.isa.tile(tile.len(), a, panel, run > 0, tile_sums);
                continue;
            }
            self.isa.tile(tile.len(), a, panel, false, products);
            let rows = tile_sums.chunks_exact_mut(I::FEATURES);
            let rows = tile
                .clone()
                .zip(rows)
                .zip(products.chunks_exact(I::FEATURES));
            for ((row, sums), products) in rows {
                let x_scale = self.rows.scale(row, self.runs[run].group);
                let scaled = products.iter().zip(scales.iter());
                let scaled = scaled.map(|(product, w_scale)| product * (x_scale * w_scale));
                match run {
                    0 => sums.iter_mut().zip(scaled).for_each(|(sum, y)| *sum = y),
                    _ => sums.iter_mut().zip(scaled).for_each(|(sum, y)| *sum += y),
                }
            }
        }
    }

    /// Whether no scale changes along K: sums are added up over all runs and scaled once.
    #[inline(always)]
    fn is_whole(&self) -> bool {
        self.runs
            .last()
            .is_none_or(|run| run.group == 0 && run.block == 0)
    }

    /// Writes the results of the output features from `first` on.
    #[inline(always)]
    fn write(&mut self, first: usize) {
        let n = self.product.matrix.n;
        let features = first..self.features.end.min(first + I::FEATURES);
        let planes = self.rows.planes();
        let whole = self.is_whole();
        let Scratch {
            scales,
            biases,
            sums,
            ..
        } = &mut *self.scratch;
        if whole {
            self.product
                .fill_scales(scales, first, &self.runs[0], self.rows.k());
        }
        for (bias, feature) in biases.iter_mut().zip(features.clone()) {
            *bias = self.product.bias(feature);
        }
        let rows = sums.chunks_exact_mut(planes * I::FEATURES);
        for (m, planes) in (self.batch.start / planes..self.batch.end / planes).zip(rows) {
            let (sum, others) = planes.split_at_mut(I::FEATURES);
            for other in others.chunks_exact(I::FEATURES) {
                sum.iter_mut()
                    .zip(other)
                    .for_each(|(sum, other)| *sum += other);
            }
            if whole {
                let x_scale = self.rows.scale(m * self.rows.planes(), 0);
                let scaled = sum.iter_mut().zip(scales.iter());
                scaled.for_each(|(sum, w_scale)| *sum *= x_scale * w_scale);
            }
            // SAFETY: inside `[m, n]`, and this task alone has these features.
            let out = unsafe { self.product.out.row(m * n + first, features.len()) };
            for ((out, sum), bias) in out.iter_mut().zip(sum).zip(biases.iter()) {
                out.write(*sum + bias);
            }
        }
    }
}
