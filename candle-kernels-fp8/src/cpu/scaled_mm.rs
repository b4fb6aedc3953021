//! `y[m, n] = Σ_segments (x_scale · w_scale) · Σ_k x[m, k] · w[n, k]  + bias[n]`, in f32.
//!
//! A segment is a run of K on which both scales are constant. The weight stays in its codes: at most four rows of one
//! tile of K are decoded at a time, into a buffer of the thread.

use super::generic::{self, ROWS};
use super::rows_per_task;
use crate::{RowScales, ScaleLayout};
use rayon::prelude::*;
use std::ops::Range;

/// Elements of K that are decoded at a time when several rows of activations share them: with four weight rows, 16 KiB.
const TILE: usize = 1024;

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

/// One product of activations `[m, k]` with the transpose of a weight `[n, k]`.
#[derive(Debug, Clone, Copy)]
pub struct ScaledMm<'a> {
    /// Rows of activations.
    pub m: usize,
    /// Output features.
    pub n: usize,
    /// Input features.
    pub k: usize,
    /// `[m, k]`.
    pub activations: Activations<'a>,
    /// E4M3 codes, `[n, k]`.
    pub weight: &'a [u8],
    /// Scales of the weight, as `layout` says.
    pub weight_scale: &'a [f32],
    /// Layout of `weight_scale`.
    pub layout: ScaleLayout,
    /// `[n]`.
    pub bias: Option<&'a [f32]>,
}

/// Computes the product into `out`, `[m, n]`.
///
/// Every sum over a segment is an f32 sum of f32 products (those of two codes are exact). It is multiplied by the
/// product of the two scales, and segments and bias are added in f32.
///
/// # Panics
/// If a slice does not have the length that the sizes ask for.
pub fn scaled_mm(args: &ScaledMm<'_>, out: &mut [f32]) {
    let &ScaledMm { m, n, k, .. } = args;
    assert_eq!(out.len(), m * n, "out is [m, n]");
    assert_eq!(args.weight.len(), n * k, "weight is [n, k]");
    assert_eq!(
        args.weight_scale.len(),
        args.layout.len(n, k),
        "weight_scale is as its layout says"
    );
    assert!(args.bias.is_none_or(|bias| bias.len() == n), "bias is [n]");
    if m == 0 || n == 0 {
        return;
    }

    let decoded;
    let x = match args.activations {
        Activations::Values(values) => values,
        Activations::Codes { codes, .. } => {
            decoded = decode_activations(codes);
            &decoded
        }
    };
    assert_eq!(x.len(), m * k, "activations are [m, k]");
    let product = Product {
        args,
        x,
        x_scales: XScales::new(args),
        segments: segments(args),
    };
    if m == 1 {
        product.one_row(out);
    } else {
        product.rows(out);
    }
}

fn decode_activations(codes: &[u8]) -> Vec<f32> {
    let mut values = vec![0f32; codes.len()];
    generic::decode(codes, &mut values);
    values
}

/// The scale of activation row `m` in group `g` is `scales[m * row + g * group]`.
struct XScales<'a> {
    scales: &'a [f32],
    row: usize,
    group: usize,
}

impl<'a> XScales<'a> {
    fn new(args: &ScaledMm<'a>) -> Self {
        let Activations::Codes {
            scales, scaling, ..
        } = args.activations
        else {
            return Self {
                scales: &[1.0],
                row: 0,
                group: 0,
            };
        };
        assert_eq!(
            scales.len(),
            scaling.len(args.m, args.k),
            "activation scales are as their scaling says"
        );
        let (row, group) = match scaling {
            Scaling::Tensor => (0, 0),
            Scaling::Token => (1, 0),
            Scaling::Group(group) => (args.k.div_ceil(group), 1),
        };
        Self { scales, row, group }
    }

    fn at(&self, row: usize, segment: &Segment) -> f32 {
        self.scales[row * self.row + segment.group * self.group]
    }
}

/// A run of K on which no scale changes.
struct Segment {
    range: Range<usize>,
    /// Index of the activations' group.
    group: usize,
    /// Index of the weight row's scale.
    block: usize,
}

fn segments(args: &ScaledMm<'_>) -> Vec<Segment> {
    let k = args.k;
    let run = args.layout.run(k);
    let group = match args.activations {
        Activations::Codes {
            scaling: Scaling::Group(group),
            ..
        } => group,
        _ => k,
    };
    let mut segments = Vec::new();
    let mut start = 0;
    while start < k {
        let (g, b) = (start / group, start / run);
        let end = ((g + 1) * group).min((b + 1) * run).min(k);
        segments.push(Segment {
            range: start..end,
            group: g,
            block: b,
        });
        start = end;
    }
    segments
}

struct Product<'a> {
    args: &'a ScaledMm<'a>,
    x: &'a [f32],
    x_scales: XScales<'a>,
    segments: Vec<Segment>,
}

impl Product<'_> {
    fn row_scales(&self, row: usize) -> RowScales<'_> {
        self.args
            .layout
            .row(self.args.weight_scale, row, self.args.k)
    }

    fn bias(&self, row: usize) -> f32 {
        self.args.bias.map_or(0.0, |bias| bias[row])
    }

    /// One row of activations: every weight is used once, so it is decoded on the way.
    fn one_row(&self, out: &mut [f32]) {
        let k = self.args.k;
        let task = |first: usize, out: &mut [f32]| {
            for (n, y) in (first..).zip(out) {
                let codes = &self.args.weight[n * k..][..k];
                let scales = self.row_scales(n).scales;
                let mut sum = 0.0;
                for segment in &self.segments {
                    let range = segment.range.clone();
                    let dot = generic::dot_codes(&codes[range.clone()], &self.x[range]);
                    sum += dot * (self.x_scales.at(0, segment) * scales[segment.block]);
                }
                *y = sum + self.bias(n);
            }
        };
        for_each_chunk(out, rows_per_task(k), task);
    }

    /// Several rows of activations: four weight rows are decoded a tile at a time, and all activations pass over it.
    fn rows(&self, out: &mut [f32]) {
        let (m, n) = (self.args.m, self.args.n);
        // Threads divide the output features, so that each weight is decoded once: write [n, m], transpose at the end.
        let mut transposed = vec![0f32; n * m];
        let task = |first: usize, out: &mut [f32]| {
            let mut scratch = Scratch::new(m, self.args.k);
            for (four, out) in out.chunks_mut(ROWS * m).enumerate() {
                self.four_rows(first / m + four * ROWS, &mut scratch, out);
            }
        };
        // A row costs as much as m rows of a product with a single activation.
        let rows = rows_per_task(self.args.k.saturating_mul(m)).next_multiple_of(ROWS);
        for_each_chunk(&mut transposed, rows * m, task);
        for (row, out) in out.chunks_exact_mut(n).enumerate() {
            for (feature, y) in out.iter_mut().enumerate() {
                *y = transposed[feature * m + row] + self.bias(feature);
            }
        }
    }

    /// Output features `first..first + out.len() / m`, at most [`ROWS`] of them, into `out`, `[features, m]`.
    fn four_rows(&self, first: usize, scratch: &mut Scratch, out: &mut [f32]) {
        let (m, k) = (self.args.m, self.args.k);
        let features = out.len() / m;
        for segment in &self.segments {
            scratch.sums.fill([0.0; ROWS]);
            let mut start = segment.range.start;
            while start < segment.range.end {
                let end = (start + TILE).min(segment.range.end);
                let len = end - start;
                for (r, tile) in scratch.tiles.chunks_exact_mut(scratch.tile).enumerate() {
                    // Past the last feature, repeat it: its sums are not used.
                    let row = first + r.min(features - 1);
                    generic::decode(&self.args.weight[row * k..][start..end], &mut tile[..len]);
                }
                let tiles: [&[f32]; ROWS] =
                    std::array::from_fn(|r| &scratch.tiles[r * scratch.tile..][..len]);
                for (row, sums) in scratch.sums.iter_mut().enumerate() {
                    let dots = generic::dot_rows(tiles, &self.x[row * k..][start..end]);
                    for (sum, dot) in sums.iter_mut().zip(dots) {
                        *sum += dot;
                    }
                }
                start = end;
            }
            for (r, out) in out.chunks_exact_mut(m).enumerate() {
                let w_scale = self.row_scales(first + r).scales[segment.block];
                for (row, y) in out.iter_mut().enumerate() {
                    *y += scratch.sums[row][r] * (self.x_scales.at(row, segment) * w_scale);
                }
            }
        }
    }
}

/// What a task needs beside its output.
struct Scratch {
    /// Decoded weights, `[ROWS, tile]`.
    tiles: Vec<f32>,
    tile: usize,
    /// Sums over a segment, `[m]`.
    sums: Vec<[f32; ROWS]>,
}

impl Scratch {
    fn new(m: usize, k: usize) -> Self {
        let tile = TILE.min(k).max(1);
        Self {
            tiles: vec![0.0; ROWS * tile],
            tile,
            sums: vec![[0.0; ROWS]; m],
        }
    }
}

/// Runs `task(offset, chunk)` over chunks of `out` on rayon's threads, or here if there is only one chunk.
fn for_each_chunk(out: &mut [f32], chunk: usize, task: impl Fn(usize, &mut [f32]) + Sync) {
    if out.len() <= chunk {
        task(0, out);
    } else {
        out.par_chunks_mut(chunk)
            .enumerate()
            .for_each(|(i, out)| task(i * chunk, out));
    }
}
