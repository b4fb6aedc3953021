//! Inner loops in portable Rust, shaped so that the compiler vectorizes them for any target.

use super::isa::{Block, Isa, Job, Strip};
use crate::e4m3;
use half::bf16;

/// Portable Rust.
#[derive(Debug, Clone, Copy)]
pub struct Generic;

/// Independent partial sums of a dot product: enough to hide the latency of an addition.
const LANES: usize = 16;

const ROWS: usize = 4;
const FEATURES: usize = 8;

impl Isa for Generic {
    type Operand = f32;
    const DEPTH: usize = 1;
    const ROWS: usize = ROWS;
    const FEATURES: usize = FEATURES;
    const CHUNK: usize = LANES;

    fn vectorize<J: Job>(self, job: J) -> J::Output {
        job.run()
    }

    fn dot_e4m3<const M: usize>(self, strip: &Strip<'_, u8, f32>, out: &mut [f32]) {
        dot_rows::<M, _>(strip, e4m3::widen, out);
    }

    fn dot_bf16<const M: usize>(self, strip: &Strip<'_, bf16, f32>, out: &mut [f32]) {
        dot_rows::<M, _>(strip, bf16::to_f32, out);
    }

    fn pack_e4m3(self, block: &Block<'_, u8>, panel: &mut [f32]) {
        pack(block, e4m3::widen, panel);
    }

    fn pack_bf16(self, block: &Block<'_, bf16>, panel: &mut [f32]) {
        pack(block, bf16::to_f32, panel);
    }

    fn tile(self, rows: usize, a: &[f32], panel: &[f32], add: bool, sums: &mut [f32]) {
        match rows {
            1 => tile::<1>(a, panel, add, sums),
            2 => tile::<2>(a, panel, add, sums),
            3 => tile::<3>(a, panel, add, sums),
            _ => tile::<ROWS>(a, panel, add, sums),
        }
    }

    fn tile_f32(self, rows: usize, a: &[f32], panel: &[f32], sums: &mut [f32]) {
        self.tile(rows, a, panel, false, sums);
    }

    fn prefetch<T>(self, _: *const T) {}

    fn multiply(self, rounds: usize) -> u64 {
        let mut sums = [[0f32; FEATURES]; ROWS];
        let (a, b) = std::hint::black_box(([1e-3f32; ROWS], [1e-3f32; FEATURES]));
        for _ in 0..rounds {
            for (sums, a) in sums.iter_mut().zip(a) {
                for (sum, b) in sums.iter_mut().zip(b) {
                    *sum += a * b;
                }
            }
        }
        std::hint::black_box(sums);
        2 * (rounds * ROWS * FEATURES) as u64
    }
}

fn dot_rows<const M: usize, W: Copy>(
    strip: &Strip<'_, W, f32>,
    widen: impl Fn(W) -> f32 + Copy,
    out: &mut [f32],
) {
    strip.rows(M, LANES, out);
    let mut scales = strip.scales.chunks_exact(M);
    let rows = strip.weights.chunks(strip.pitch);
    for (row, out) in rows.zip(out.chunks_exact_mut(M)) {
        out.fill(0.0);
        let (mut start, mut x_start) = (0, 0);
        for &len in strip.runs {
            let run = &row[start..start + len];
            let scales = scales.next().unwrap_or(&[]);
            for ((m, out), scale) in out.iter_mut().enumerate().zip(scales) {
                let x = &strip.x[m * strip.stride + x_start..][..len];
                *out += dot(run, x, widen) * scale;
            }
            start += len;
            x_start += len.next_multiple_of(LANES);
        }
    }
}

#[inline(always)]
fn dot<W: Copy>(weights: &[W], x: &[f32], widen: impl Fn(W) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let (chunks, rest) = weights.as_chunks::<LANES>();
    let (x_chunks, x_rest) = x.as_chunks::<LANES>();
    for (w, x) in chunks.iter().zip(x_chunks) {
        for i in 0..LANES {
            lanes[i] += widen(w[i]) * x[i];
        }
    }
    let mut sum = sum_lanes(lanes);
    for (&w, &x) in rest.iter().zip(x_rest) {
        sum += widen(w) * x;
    }
    sum
}

/// Adds lanes up as a tree.
fn sum_lanes(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
    }
    lanes[0]
}

fn pack<W: Copy>(block: &Block<'_, W>, widen: impl Fn(W) -> f32, panel: &mut [f32]) {
    block.check(FEATURES, 1, panel);
    panel.fill(0.0);
    for (feature, row) in block
        .weights
        .chunks(block.stride)
        .take(block.features)
        .enumerate()
    {
        for (group, &w) in panel.chunks_exact_mut(FEATURES).zip(row) {
            group[feature] = widen(w);
        }
    }
}

fn tile<const R: usize>(a: &[f32], panel: &[f32], add: bool, out: &mut [f32]) {
    let out = &mut out[..R * FEATURES];
    let mut sums = [[0f32; FEATURES]; R];
    if add {
        sums.as_flattened_mut().copy_from_slice(out);
    }
    let (a, panel) = (a.as_chunks::<R>().0, panel.as_chunks::<FEATURES>().0);
    for (a, b) in a.iter().zip(panel) {
        for r in 0..R {
            for f in 0..FEATURES {
                sums[r][f] += a[r] * b[f];
            }
        }
    }
    out.copy_from_slice(sums.as_flattened());
}
