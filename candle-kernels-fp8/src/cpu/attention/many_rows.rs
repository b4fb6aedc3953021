//! Many rows: a block of keys and values is packed once and multiplied with many rows of queries.
//!
//! Rows of queries lie side by side in the lanes of vectors, keys (and then the elements of values) one below the other.
//! So the scores of a block come out as one row of lanes for each key, which is what the softmax wants (no sums across
//! lanes) and what the product with the values takes as its panel.

use super::Attention;
use crate::cpu::element::Element;
use crate::cpu::exp::exp;
use crate::cpu::isa::{Isa, Job};
use crate::cpu::lanes::larger;
use crate::cpu::matmul::share;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Rows of queries of a task: enough to make up for packing the keys, few enough to stay in a core's second cache.
const ROWS: usize = 384;

/// Keys that are packed at a time: a multiple of the heights of all instruction sets' tiles.
const KEYS: usize = 120;

pub(super) fn attention<I: Isa, T: Element>(
    isa: I,
    args: &Attention<'_, T>,
    out: &mut [MaybeUninit<T>],
) {
    let out = Out(out.as_mut_ptr());
    let heads = args.batch * args.kv_heads;
    let blocks = args.rows().div_ceil(ROWS);
    share(
        heads * blocks,
        || Scratch::new::<I>(args.dim),
        |scratch, task| {
            // The last rows see most keys: they are handed out first.
            let (block, head) = (blocks - 1 - task / heads, task % heads);
            isa.vectorize(Rows {
                isa,
                args,
                batch: head / args.kv_heads,
                kv_head: head % args.kv_heads,
                rows: block * ROWS..args.rows().min((block + 1) * ROWS),
                scratch,
                out,
            });
        },
    );
}

/// Where tasks write different rows.
#[derive(Clone, Copy)]
struct Out<T>(*mut MaybeUninit<T>);

// SAFETY: it is a place to write to, and writing is unsafe.
unsafe impl<T: Send> Send for Out<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Out<T> {}

/// What a thread needs. F is the number of lanes, D the dimension of a head.
struct Scratch {
    /// For each tile of F rows: `[D][F]`.
    q: Vec<f32>,
    /// Tiles of keys, `[D][height]` each.
    k: Vec<f32>,
    /// Tiles of columns of the values, `[KEYS][height]` each.
    v: Vec<f32>,
    /// `[height][D]`: the keys of a tile.
    rows: Vec<f32>,
    /// `[KEYS][F]`: scores, then weights.
    scores: Vec<f32>,
    /// `[height][F]`: what a tile of values comes to.
    sums: Vec<f32>,
    /// For each tile of rows `[D][F]`: the weighted sums of the values.
    totals: Vec<f32>,
    /// For each tile of rows `[F]`: the largest score.
    largest: Vec<f32>,
    /// For each tile of rows `[F]`: the sum of the exponentials.
    weights: Vec<f32>,
}

impl Scratch {
    fn new<I: Isa>(dim: usize) -> Self {
        let lanes = I::FEATURES;
        let rows = ROWS.next_multiple_of(lanes);
        let zeros = |n| vec![0f32; n];
        Self {
            q: zeros(rows * dim),
            k: zeros(KEYS * dim),
            v: zeros(KEYS * dim),
            rows: zeros(I::ROWS * dim),
            scores: zeros(KEYS * lanes),
            sums: zeros(I::ROWS * lanes),
            totals: zeros(rows * dim),
            largest: zeros(rows),
            weights: zeros(rows),
        }
    }
}

/// Some rows of a head of keys over all the keys that they see.
struct Rows<'a, I, T> {
    isa: I,
    args: &'a Attention<'a, T>,
    batch: usize,
    kv_head: usize,
    rows: Range<usize>,
    scratch: &'a mut Scratch,
    out: Out<T>,
}

impl<I: Isa, T: Element> Job for Rows<'_, I, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        match (I::FEATURES, I::ROWS) {
            (8, 4) => self.with_tiles::<8, 4>(),
            (8, 12) => self.with_tiles::<8, 12>(),
            (16, 6) => self.with_tiles::<16, 6>(),
            (32, 12) => self.with_tiles::<32, 12>(),
            (lanes, height) => unreachable!("tiles of {height} rows and {lanes} features"),
        }
    }
}

impl<I: Isa, T: Element> Rows<'_, I, T> {
    #[inline(always)]
    fn with_tiles<const F: usize, const H: usize>(self) {
        let Self {
            isa,
            args,
            batch,
            kv_head,
            rows,
            scratch,
            out,
        } = self;
        let dim = args.dim;
        let tiles: Vec<Tile<F>> = (rows.clone().step_by(F))
            .map(|first| Tile::new(args, first..rows.end.min(first + F)))
            .collect();
        for (tile, q) in tiles.iter().zip(scratch.q.chunks_exact_mut(dim * F)) {
            tile.pack_queries(args, batch, kv_head, q);
        }
        scratch.totals.fill(0.0);
        scratch.largest.fill(f32::MIN);
        scratch.weights.fill(0.0);

        let k = args.k.head(batch, kv_head, args.keys, dim);
        let v = args.v.head(batch, kv_head, args.keys, dim);
        let keys = args.seen(rows.start).start..args.seen(rows.end - 1).end;
        for start in keys.clone().step_by(KEYS) {
            let end = keys.end.min(start + KEYS);
            let count = end - start;
            let (k, v) = (&k[start * dim..end * dim], &v[start * dim..end * dim]);
            pack_keys::<H, T>(k, dim, &mut scratch.rows, &mut scratch.k);
            pack_values::<H, T>(v, dim, &mut scratch.v);
            for (index, tile) in tiles.iter().enumerate() {
                // Of this block's keys, those that some row sees.
                let count = tile.end.saturating_sub(start).min(count);
                if count == 0 || tile.start >= end {
                    continue;
                }
                let q = &scratch.q[index * dim * F..][..dim * F];
                let scores = &mut scratch.scores[..];
                for first in (0..count).step_by(H) {
                    let height = H.min(end - start - first);
                    let k = &scratch.k[first * dim..][..height * dim];
                    isa.tile_f32(height, k, q, &mut scores[first * F..]);
                }
                let scores = scores[..count * F].as_chunks_mut::<F>().0;
                tile.hide(start, scores);
                let largest = array::<F>(&mut scratch.largest[index * F..]);
                let weights = array::<F>(&mut scratch.weights[index * F..]);
                let factors = weigh(scores, largest, weights);
                let scores = scores.as_flattened();
                let mut first = 0;
                while first < dim {
                    let height = H.min(dim - first);
                    let v = &scratch.v[first * (end - start)..][..height * count];
                    isa.tile_f32(height, v, scores, &mut scratch.sums);
                    let totals = &mut scratch.totals[(index * dim + first) * F..][..height * F];
                    let totals = totals.as_chunks_mut::<F>().0.iter_mut();
                    for (total, sum) in totals.zip(scratch.sums.as_chunks::<F>().0) {
                        for i in 0..F {
                            total[i] = total[i] * factors[i] + sum[i];
                        }
                    }
                    first += height;
                }
            }
        }
        for (index, tile) in tiles.iter().enumerate() {
            let totals = scratch.totals[index * dim * F..][..dim * F]
                .as_chunks::<F>()
                .0;
            for (lane, row) in tile.rows.clone().enumerate() {
                let weight = scratch.weights[index * F + lane];
                let at = args.at(batch, kv_head, row);
                for (d, total) in totals.iter().enumerate() {
                    // SAFETY: `out` is as long as `q`, and this task alone has these rows.
                    unsafe { (*out.0.add(at + d)).write(T::from_f32(total[lane] / weight)) };
                }
            }
        }
    }
}

/// The next F elements.
#[inline(always)]
fn array<const F: usize>(values: &mut [f32]) -> &mut [f32; F] {
    &mut values.as_chunks_mut::<F>().0[0]
}

/// Up to F rows, side by side. Lanes without a row repeat the last one's keys, of a query of zeros.
struct Tile<const F: usize> {
    rows: Range<usize>,
    /// First and last keys that a row sees: first `start` and one after `end`.
    start: usize,
    end: usize,
    /// The keys that each lane sees.
    starts: [u32; F],
    ends: [u32; F],
}

impl<const F: usize> Tile<F> {
    fn new<T: Element>(args: &Attention<'_, T>, rows: Range<usize>) -> Self {
        let last = rows.end - 1;
        let seen: [Range<usize>; F] =
            std::array::from_fn(|lane| args.seen(last.min(rows.start + lane)));
        Self {
            start: seen[0].start,
            end: seen[F - 1].end,
            starts: std::array::from_fn(|lane| seen[lane].start as u32),
            ends: std::array::from_fn(|lane| seen[lane].end as u32),
            rows,
        }
    }

    /// Writes the queries, scaled, as `[D][F]`.
    #[inline(always)]
    fn pack_queries<T: Element>(
        &self,
        args: &Attention<'_, T>,
        batch: usize,
        kv_head: usize,
        panel: &mut [f32],
    ) {
        panel.fill(0.0);
        for (lane, row) in self.rows.clone().enumerate() {
            let q = &args.q[args.at(batch, kv_head, row)..][..args.dim];
            for (lanes, q) in panel.as_chunks_mut::<F>().0.iter_mut().zip(q) {
                lanes[lane] = q.to_f32() * args.scale;
            }
        }
    }

    /// Scores of keys from `first` on become -∞ where a row does not see the key.
    #[inline(always)]
    fn hide(&self, first: usize, scores: &mut [[f32; F]]) {
        let all = first..first + scores.len();
        let seen_by_all = self.starts[F - 1] as usize..self.ends[0] as usize;
        if seen_by_all.start <= all.start && all.end <= seen_by_all.end {
            return;
        }
        for (key, scores) in (first as u32..).zip(scores) {
            let lanes = scores.iter_mut().zip(&self.starts).zip(&self.ends);
            for ((score, &start), &end) in lanes {
                let seen = (key >= start) & (key < end);
                *score = if seen { *score } else { f32::NEG_INFINITY };
            }
        }
    }
}

/// Turns scores into weights relative to the largest score so far of each lane, and gives what older sums are
/// multiplied by. Scores of -∞ get the weight 0.
#[inline(always)]
fn weigh<const F: usize>(
    scores: &mut [[f32; F]],
    largest: &mut [f32; F],
    total: &mut [f32; F],
) -> [f32; F] {
    let mut most = *largest;
    for scores in scores.iter() {
        for i in 0..F {
            most[i] = larger(most[i], scores[i]);
        }
    }
    let mut factors = [0f32; F];
    for i in 0..F {
        factors[i] = exp(largest[i] - most[i]);
    }
    let mut sums = [0f32; F];
    for scores in scores {
        for i in 0..F {
            scores[i] = exp(scores[i] - most[i]);
            sums[i] += scores[i];
        }
    }
    *largest = most;
    for i in 0..F {
        total[i] = total[i] * factors[i] + sums[i];
    }
    factors
}

/// Writes keys `[n, D]` as tiles of up to H keys, `[D][height]` each. `rows` is room for H keys.
#[inline(always)]
fn pack_keys<const H: usize, T: Element>(k: &[T], dim: usize, rows: &mut [f32], tiles: &mut [f32]) {
    for (k, tile) in k.chunks(H * dim).zip(tiles.chunks_mut(H * dim)) {
        let height = k.len() / dim;
        for (row, k) in rows.iter_mut().zip(k) {
            *row = k.to_f32();
        }
        if height == H {
            for (d, group) in tile.as_chunks_mut::<H>().0.iter_mut().enumerate() {
                for r in 0..H {
                    group[r] = rows[r * dim + d];
                }
            }
        } else {
            for (d, group) in tile.chunks_exact_mut(height).enumerate() {
                for (r, value) in group.iter_mut().enumerate() {
                    *value = rows[r * dim + d];
                }
            }
        }
    }
}

/// Writes values `[n, D]` as tiles of up to H columns, `[n][height]` each.
#[inline(always)]
fn pack_values<const H: usize, T: Element>(v: &[T], dim: usize, tiles: &mut [f32]) {
    let count = v.len() / dim;
    let (whole, rest) = tiles[..count * dim].split_at_mut(dim / H * H * count);
    for (tile, first) in whole.chunks_exact_mut(count * H).zip((0..).step_by(H)) {
        let rows = tile.as_chunks_mut::<H>().0.iter_mut();
        for (to, v) in rows.zip(v.chunks_exact(dim)) {
            let from = &v[first..first + H];
            for i in 0..H {
                to[i] = from[i].to_f32();
            }
        }
    }
    let columns = dim % H;
    if columns > 0 {
        for (to, v) in rest.chunks_exact_mut(columns).zip(v.chunks_exact(dim)) {
            for (to, from) in to.iter_mut().zip(&v[dim - columns..]) {
                *to = from.to_f32();
            }
        }
    }
}
