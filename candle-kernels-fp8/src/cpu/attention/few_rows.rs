//! Few rows: every key and value is used so few times that reading it is what counts.

use super::Attention;
use crate::cpu::element::Element;
use crate::cpu::exp::exp;
use crate::cpu::isa::{Isa, Job};
use crate::cpu::lanes;
use crate::cpu::matmul::share;
use std::mem::MaybeUninit;
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
const SERIAL: usize = 1 << 19;

pub(super) fn attention<I: Isa, T: Element>(
    isa: I,
    args: &Attention<'_, T>,
    out: &mut [MaybeUninit<T>],
) {
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
    fn run(mut self) {
        let rows = self.args.rows();
        for first in (0..rows).step_by(AT_ONCE) {
            match rows - first {
                1 => self.pass::<1>(first),
                2 => self.pass::<2>(first),
                3 => self.pass::<3>(first),
                _ => self.pass::<AT_ONCE>(first),
            }
        }
    }
}

/// Does something for each of up to four rows, without a loop: compilers like to vectorize the rows of one, and not the
/// lanes in it.
macro_rules! each_row {
    ($rows:ident, $row:ident => $body:expr) => {
        each_row!(@ $rows, $row, $body, 0 1 2 3)
    };
    (@ $rows:ident, $row:ident, $body:expr, $($index:literal)*) => {
        $(if $index < $rows {
            let $row = $index;
            $body;
        })*
    };
}

/// So many neighbours of each of R rows.
type Lanes<const R: usize> = [[f32; LANES]; R];

impl<T: Element> Rows<'_, T> {
    /// R rows from `first` on.
    #[inline(always)]
    fn pass<const R: usize>(&mut self, first: usize) {
        let (args, dim) = (self.args, self.args.dim);
        let mut q: Vec<Lanes<R>> = vec![[[0.0; LANES]; R]; dim.div_ceil(LANES)];
        for r in 0..R {
            let at = args.at(self.batch, self.kv_head, first + r);
            let row = args.q[at..at + dim].chunks(LANES);
            for (q, row) in q.iter_mut().zip(row) {
                for (q, value) in q[r].iter_mut().zip(row) {
                    *q = value.to_f32() * args.scale;
                }
            }
        }
        let keys = self.keys.start * dim..self.keys.end * dim;
        let k = &args.k.head(self.batch, self.kv_head, args.keys, dim)[keys.clone()];
        let v = &args.v.head(self.batch, self.kv_head, args.keys, dim)[keys.clone()];
        // What the thread is likely to go through next: the same keys of the next head.
        let next_head = match self.kv_head + 1 < args.kv_heads {
            true => &args.k.head(self.batch, self.kv_head + 1, args.keys, dim)[keys],
            false => &[],
        };

        let mut largest = [f32::MIN; R];
        let mut totals = [0f32; R];
        let mut sums: Vec<Lanes<R>> = vec![[[0.0; LANES]; R]; q.len()];
        let blocks = k.chunks(BLOCK * dim).zip(v.chunks(BLOCK * dim));
        // Keys after the block's.
        let mut after = k;
        for (start, (k, v)) in (self.keys.start..).step_by(BLOCK).zip(blocks) {
            after = &after[k.len()..];
            let ahead = if after.is_empty() { next_head } else { after };
            let count = k.len() / dim;
            let mut products = [[[0f32; LANES]; BLOCK]; R];
            for (key, k) in (0..BLOCK).zip(k.chunks_exact(dim)) {
                fetch(v, key * dim, dim);
                let sums = multiply::<R, T>(&q, k);
                each_row!(R, r => products[r][key] = sums[r]);
            }
            let mut scores = [[f32::NEG_INFINITY; BLOCK]; R];
            for (scores, products) in scores.iter_mut().zip(&products) {
                add_up(&products[..count], &mut scores[..count]);
            }
            let mut factors = [0f32; R];
            for r in 0..R {
                let scores = &mut scores[r];
                let seen = args.seen(first + r);
                let before = seen.start.saturating_sub(start).min(count);
                let end = seen.end.saturating_sub(start).min(count);
                scores[..before].fill(f32::NEG_INFINITY);
                scores[end..count].fill(f32::NEG_INFINITY);
                factors[r] = weigh(scores, &mut largest[r], &mut totals[r]);
            }
            // Whole lanes, two at a time, then one, then part of one.
            let (whole, part) = sums.split_at_mut(dim / LANES);
            let (pairs, single) = whole.as_chunks_mut::<2>();
            let mut start = 0;
            for sums in pairs {
                let ahead = if start == 0 { ahead } else { &[] };
                add_values::<R, 2, T>((v, ahead), dim, start, &scores, &factors, sums);
                start += 2 * LANES;
            }
            for sums in single.as_chunks_mut::<1>().0 {
                add_values::<R, 1, T>((v, &[]), dim, start, &scores, &factors, sums);
                start += LANES;
            }
            for sums in part {
                add_rest::<R, T>(v, dim, start, &scores, &factors, sums);
            }
        }
        for r in 0..R {
            let partial = &mut self.partial[(first + r) * (dim + 2)..][..dim + 2];
            for (partial, sums) in partial[..dim].chunks_mut(LANES).zip(&sums) {
                partial.copy_from_slice(&sums[r][..partial.len()]);
            }
            partial[dim] = largest[r];
            partial[dim + 1] = totals[r];
        }
    }
}

/// The products of a key with R rows, added up in lanes.
#[inline(always)]
fn multiply<const R: usize, T: Element>(q: &[Lanes<R>], k: &[T]) -> Lanes<R> {
    let mut sums = [[0f32; LANES]; R];
    let (chunks, rest) = k.as_chunks::<LANES>();
    for (q, k) in q.iter().zip(chunks) {
        let k = widen(k);
        each_row!(R, r => add_product(&mut sums[r], &q[r], &k));
    }
    if let (false, Some(q)) = (rest.is_empty(), q.last()) {
        let k = widen_part(rest);
        each_row!(R, r => add_product(&mut sums[r], &q[r], &k));
    }
    sums
}

/// Adds up the lanes of each key.
#[inline(always)]
fn add_up(products: &[[f32; LANES]], scores: &mut [f32]) {
    for (lanes, score) in products.iter().zip(scores) {
        let mut parts = [0f32; 4];
        for i in 0..4 {
            parts[i] = (lanes[i] + lanes[i + 4]) + (lanes[i + 8] + lanes[i + 12]);
        }
        // A vector of four so far. Unless they are seen to be needed in memory, compilers add lane by lane from the
        // start, or gather the lanes of many keys.
        let parts = std::hint::black_box(&parts);
        *score = (parts[0] + parts[1]) + (parts[2] + parts[3]);
    }
}

/// `sums += a · b`
#[inline(always)]
fn add_product(sums: &mut [f32; LANES], a: &[f32; LANES], b: &[f32; LANES]) {
    for i in 0..LANES {
        sums[i] += a[i] * b[i];
    }
}

#[inline(always)]
fn widen<T: Element>(values: &[T; LANES]) -> [f32; LANES] {
    let mut wide = [0f32; LANES];
    for i in 0..LANES {
        wide[i] = values[i].to_f32();
    }
    wide
}

/// Fewer than `LANES` elements, and zeros after them.
#[inline(always)]
fn widen_part<T: Element>(values: &[T]) -> [f32; LANES] {
    let mut wide = [0f32; LANES];
    for (wide, value) in wide.iter_mut().zip(values) {
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

/// Asks for elements `at..at + len` ahead of their use, as far as there are so many. Heads are short, and the processor
/// finds out by itself only late where they go on.
#[inline(always)]
fn fetch<T>(values: &[T], at: usize, len: usize) {
    #[cfg(target_arch = "x86_64")]
    if let Some(values) = values.get(at..at + len) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        for line in (0..size_of_val(values)).step_by(64) {
            // SAFETY: every x86-64 has the instruction, and any address will do.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(values.as_ptr().cast::<i8>().wrapping_add(line)) };
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (values, at, len);
}

/// Multiplies sums with `factors` and adds `weights · v`, for `P · LANES` columns from `start` on. Asks for the rows of
/// `ahead` on the way.
#[inline(always)]
fn add_values<const R: usize, const P: usize, T: Element>(
    (v, ahead): (&[T], &[T]),
    dim: usize,
    start: usize,
    weights: &[[f32; BLOCK]; R],
    factors: &[f32; R],
    sums: &mut [Lanes<R>; P],
) {
    let mut all = *sums;
    for all in &mut all {
        rescale(all, factors);
    }
    for (key, v) in (0..BLOCK).zip(v.chunks_exact(dim)) {
        fetch(ahead, key * dim, dim);
        let v = &v[start..start + P * LANES].as_chunks::<LANES>().0;
        for p in 0..P {
            let v = widen(&v[p]);
            each_row!(R, r => add_product(&mut all[p][r], &[weights[r][key]; LANES], &v));
        }
    }
    *sums = all;
}

/// As [`add_values`] for the columns from `start` on, which are fewer than `LANES`.
#[inline(always)]
fn add_rest<const R: usize, T: Element>(
    v: &[T],
    dim: usize,
    start: usize,
    weights: &[[f32; BLOCK]; R],
    factors: &[f32; R],
    sums: &mut Lanes<R>,
) {
    rescale(sums, factors);
    for (key, v) in (0..BLOCK).zip(v.chunks_exact(dim)) {
        let v = widen_part(&v[start..]);
        each_row!(R, r => add_product(&mut sums[r], &[weights[r][key]; LANES], &v));
    }
}

#[inline(always)]
fn rescale<const R: usize>(sums: &mut Lanes<R>, factors: &[f32; R]) {
    for (sums, factor) in sums.iter_mut().zip(factors) {
        for sum in sums {
            *sum *= factor;
        }
    }
}

/// Joins the ranges of each row.
struct Merge<'a, T> {
    args: &'a Attention<'a, T>,
    ranges: usize,
    partials: &'a [f32],
    out: &'a mut [MaybeUninit<T>],
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
                    out.write(T::from_f32(sum / total));
                }
            }
        }
    }
}
