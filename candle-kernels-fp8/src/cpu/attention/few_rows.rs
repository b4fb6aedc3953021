//! Few rows: every key and value is used so few times that reading it is what counts.

use super::Attention;
use crate::cpu::element::Element;
use crate::cpu::exp::exp;
use crate::cpu::isa::{Isa, Job};
use crate::cpu::lanes;
use crate::cpu::matmul::share;
use std::ops::Range;
use std::sync::Mutex;

/// Rows of a head of keys up to which nothing is packed.
pub(super) const MOST: usize = 8;

/// Rows that go through the keys together: their sums fit into registers.
const AT_ONCE: usize = 4;

/// Keys of a task. Enough to be worth handing out; fixed, so that results do not depend on the number of threads.
const RANGE: usize = 512;

/// Keys that are scored before their values are added: what is read of them stays in the first cache.
const BLOCK: usize = 64;

/// Elements that are handled at a time.
const LANES: usize = 16;

/// Products below which a single thread is done before another is awake.
const SERIAL: usize = 1 << 20;

pub(super) fn attention<I: Isa, T: Element>(isa: I, args: &Attention<'_, T>, out: &mut [T]) {
    let rows = args.rows();
    let seen = args.seen(0).start..args.seen(rows - 1).end;
    let ranges: Vec<Range<usize>> = (seen.start..seen.end)
        .step_by(RANGE)
        .map(|start| start..seen.end.min(start + RANGE))
        .collect();
    // For each sequence, head of keys, and range: the rows' partial results.
    let heads = args.batch * args.kv_heads;
    let mut partials = vec![0f32; heads * ranges.len() * rows * (args.dim + 2)];
    let one = rows * (args.dim + 2);
    let work = |task: usize, partial: &mut [f32]| {
        let (head, range) = (task / ranges.len(), &ranges[task % ranges.len()]);
        isa.vectorize(Rows {
            args,
            batch: head / args.kv_heads,
            kv_head: head % args.kv_heads,
            keys: range.clone(),
            partial,
        });
    };
    if args.products() <= SERIAL {
        for (task, partial) in partials.chunks_exact_mut(one).enumerate() {
            work(task, partial);
        }
    } else {
        let slots: Vec<_> = partials.chunks_exact_mut(one).map(Mutex::new).collect();
        share(
            slots.len(),
            || (),
            |(), task| {
                // A slot is its task's alone: nobody waits, and nobody has panicked with it.
                if let Ok(mut partial) = slots[task].lock() {
                    work(task, &mut partial);
                }
            },
        );
    }
    isa.vectorize(Merge {
        args,
        ranges: ranges.len(),
        partials: &partials,
        out,
    });
}

/// All rows of a head of keys over a range of its keys: for each row the sums of its weighted values (D), the largest
/// score, and the sum of the exponentials.
struct Rows<'a, T> {
    args: &'a Attention<'a, T>,
    batch: usize,
    kv_head: usize,
    keys: Range<usize>,
    partial: &'a mut [f32],
}

impl<T: Element> Job for Rows<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self {
            args,
            batch,
            kv_head,
            keys,
            partial,
        } = self;
        let dim = args.dim;
        let k = args.k.head(batch, kv_head, args.keys, dim);
        let v = args.v.head(batch, kv_head, args.keys, dim);
        let padded = dim.next_multiple_of(LANES);
        let mut q = vec![0f32; AT_ONCE * padded];
        let mut sums = vec![0f32; AT_ONCE * padded];
        for first in (0..args.rows()).step_by(AT_ONCE) {
            let count = AT_ONCE.min(args.rows() - first);
            for (row, q) in (first..first + count).zip(q.chunks_exact_mut(padded)) {
                let at = args.at(batch, kv_head, row);
                for (q, value) in q.iter_mut().zip(&args.q[at..at + dim]) {
                    *q = value.to_f32() * args.scale;
                }
            }
            let partial = &mut partial[first * (dim + 2)..][..count * (dim + 2)];
            let pass = Pass {
                dim,
                first: keys.start,
                k: &k[keys.start * dim..keys.end * dim],
                v: &v[keys.start * dim..keys.end * dim],
                q: &q,
            };
            let seen = |row: usize| args.seen(first + row);
            match count {
                1 => pass.run::<1>(seen, &mut sums, partial),
                2 => pass.run::<2>(seen, &mut sums, partial),
                3 => pass.run::<3>(seen, &mut sums, partial),
                _ => pass.run::<AT_ONCE>(seen, &mut sums, partial),
            }
        }
    }
}

/// What a pass over the keys of a range reads.
struct Pass<'a, T> {
    dim: usize,
    /// Index of the first key.
    first: usize,
    /// `[n, dim]`.
    k: &'a [T],
    /// `[n, dim]`.
    v: &'a [T],
    /// Scaled, `[rows, dim]`, each row padded with zeros to whole lanes.
    q: &'a [f32],
}

impl<T: Element> Pass<'_, T> {
    #[inline(always)]
    fn run<const R: usize>(
        &self,
        seen: impl Fn(usize) -> Range<usize>,
        sums: &mut [f32],
        partial: &mut [f32],
    ) {
        let dim = self.dim;
        let padded = dim.next_multiple_of(LANES);
        let mut largest = [f32::MIN; R];
        let mut totals = [0f32; R];
        sums.fill(0.0);
        let blocks = self.k.chunks(BLOCK * dim).zip(self.v.chunks(BLOCK * dim));
        for (start, (k, v)) in (self.first..).step_by(BLOCK).zip(blocks) {
            let count = k.len() / dim;
            let mut scores = [[f32::NEG_INFINITY; BLOCK]; R];
            for (key, k) in (0..BLOCK).zip(k.chunks_exact(dim)) {
                let dots = dots::<R, T>(self.q, k);
                for r in 0..R {
                    scores[r][key] = dots[r];
                }
            }
            for r in 0..R {
                let scores = &mut scores[r];
                let seen = seen(r);
                let before = seen.start.saturating_sub(start).min(count);
                let end = seen.end.saturating_sub(start).min(count);
                scores[..before].fill(f32::NEG_INFINITY);
                scores[end..count].fill(f32::NEG_INFINITY);
                let factor = weigh(scores, &mut largest[r], &mut totals[r]);
                for sum in &mut sums[r * padded..][..padded] {
                    *sum *= factor;
                }
            }
            let pairs = dim / (2 * LANES);
            for pair in 0..pairs {
                add_values::<R, 2, T>(v, dim, 2 * pair * LANES, &scores, sums);
            }
            for start in (pairs * 2 * LANES..dim).step_by(LANES) {
                add_values::<R, 1, T>(v, dim, start, &scores, sums);
            }
        }
        let rows = sums
            .chunks_exact(padded)
            .zip(partial.chunks_exact_mut(dim + 2));
        for (r, (sums, partial)) in rows.enumerate() {
            partial[..dim].copy_from_slice(&sums[..dim]);
            partial[dim..].copy_from_slice(&[largest[r], totals[r]]);
        }
    }
}

/// The dot products of a key with R rows.
#[inline(always)]
fn dots<const R: usize, T: Element>(q: &[f32], k: &[T]) -> [f32; R] {
    let padded = k.len().next_multiple_of(LANES);
    let mut sums = [[0f32; LANES]; R];
    let mut add = |at: usize, k: [f32; LANES]| {
        for r in 0..R {
            let q = &q[r * padded + at..][..LANES];
            for i in 0..LANES {
                sums[r][i] += q[i] * k[i];
            }
        }
    };
    let (chunks, rest) = k.as_chunks::<LANES>();
    for (index, k) in chunks.iter().enumerate() {
        add(index * LANES, k.map(T::to_f32));
    }
    if !rest.is_empty() {
        add(chunks.len() * LANES, widen_part(rest));
    }
    sums.map(lanes::sum)
}

/// Up to `LANES` elements, and zeros after them.
#[inline(always)]
fn widen_part<T: Element>(part: &[T]) -> [f32; LANES] {
    let mut wide = [0f32; LANES];
    for (wide, value) in wide.iter_mut().zip(part) {
        *wide = value.to_f32();
    }
    wide
}

/// Turns a block's scores into weights relative to the largest score so far, and gives what older sums are multiplied
/// by. Scores of -∞ get the weight 0.
#[inline(always)]
fn weigh(scores: &mut [f32; BLOCK], largest: &mut f32, total: &mut f32) -> f32 {
    let mut most = [f32::MIN; LANES];
    let chunks = scores.as_chunks_mut::<LANES>().0;
    for chunk in chunks.iter() {
        for i in 0..LANES {
            most[i] = lanes::larger(most[i], chunk[i]);
        }
    }
    let most = lanes::larger(*largest, lanes::max(most));
    let factor = exp(*largest - most);
    let mut sums = [0f32; LANES];
    for chunk in chunks {
        for i in 0..LANES {
            chunk[i] = exp(chunk[i] - most);
            sums[i] += chunk[i];
        }
    }
    *largest = most;
    *total = *total * factor + lanes::sum(sums);
    factor
}

/// Adds `weights · v` to the sums, for `P · LANES` columns from `start` on, of which the last may be missing.
#[inline(always)]
fn add_values<const R: usize, const P: usize, T: Element>(
    v: &[T],
    dim: usize,
    start: usize,
    weights: &[[f32; BLOCK]; R],
    sums: &mut [f32],
) {
    let padded = dim.next_multiple_of(LANES);
    let mut lanes = [[[0f32; LANES]; P]; R];
    for (key, v) in (0..BLOCK).zip(v.chunks_exact(dim)) {
        let v = &v[start..];
        for p in 0..P {
            let v = &v[p * LANES..];
            let v = match v.first_chunk::<LANES>() {
                Some(v) => v.map(T::to_f32),
                None => widen_part(v),
            };
            for r in 0..R {
                for i in 0..LANES {
                    lanes[r][p][i] += weights[r][key] * v[i];
                }
            }
        }
    }
    for r in 0..R {
        let sums = &mut sums[r * padded + start..][..P * LANES];
        for (sum, lane) in sums.iter_mut().zip(lanes[r].as_flattened()) {
            *sum += lane;
        }
    }
}

/// Joins the ranges of each row.
struct Merge<'a, T> {
    args: &'a Attention<'a, T>,
    ranges: usize,
    partials: &'a [f32],
    out: &'a mut [T],
}

impl<T: Element> Job for Merge<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let (args, dim) = (self.args, self.args.dim);
        let rows = args.rows();
        let heads = self.partials.chunks_exact(self.ranges * rows * (dim + 2));
        let mut sums = vec![0f32; dim];
        for (head, partials) in heads.enumerate() {
            for row in 0..rows {
                let parts = || partials.chunks_exact(dim + 2).skip(row).step_by(rows);
                let most = parts().map(|part| part[dim]).fold(f32::MIN, lanes::larger);
                let mut total = 0.0;
                sums.fill(0.0);
                for part in parts() {
                    let factor = exp(part[dim] - most);
                    total += part[dim + 1] * factor;
                    for (sum, value) in sums.iter_mut().zip(part) {
                        *sum += value * factor;
                    }
                }
                let at = args.at(head / args.kv_heads, head % args.kv_heads, row);
                for (out, sum) in self.out[at..at + dim].iter_mut().zip(&sums) {
                    *out = T::from_f32(sum / total);
                }
            }
        }
    }
}
