//! Causal attention over a KV cache that is read in place, with grouped-query heads.
//!
//! Scores are never stored as a whole: keys and values pass in blocks, and each query keeps its largest score, the sum
//! of its exponentials and the weighted sum of its values ("online softmax"). The query heads that share keys are
//! stacked, so that a key is read once for all of them. Few rows: keys and values are widened on their way through the
//! registers (`few_rows.rs`). Many: they are packed for the instruction set's tiles (`many_rows.rs`).
//!
//! Floor: a token reads T · Hkv · D keys and as many values, 2 · T · Hkv · D · 2 bytes in BF16 (at T = 4096, 8 heads of
//! 64: 8 MiB a layer), and takes 4 · T · Hq · D operations (34 MFLOP). A prompt of n tokens takes 2 · n² · Hq · D
//! operations and n² · Hq / 2 exponentials (at n = 512: 1.1 GFLOP and 4 M a layer).

mod few_rows;
mod many_rows;

use super::element::Element;
use super::fill::fill;
use super::isa::{InstructionSet, Isa, on};
use std::mem::MaybeUninit;
use std::ops::Range;

/// Heads of keys or values, `[B, H, T, D]` with room between sequences and heads, as in a cache that is longer than what
/// it holds.
#[derive(Debug, Clone, Copy)]
pub struct Heads<'a, T> {
    /// From the first element on.
    pub values: &'a [T],
    /// Elements from one sequence to the next.
    pub batch_stride: usize,
    /// Elements from one head to the next.
    pub head_stride: usize,
}

impl<'a, T> Heads<'a, T> {
    /// One head: `[len, dim]`.
    fn head(&self, batch: usize, head: usize, len: usize, dim: usize) -> &'a [T] {
        &self.values[batch * self.batch_stride + head * self.head_stride..][..len * dim]
    }
}

/// Attention of L queries to the T keys up to them: the last query sees the last key.
#[derive(Debug, Clone, Copy)]
pub struct Attention<'a, T> {
    /// Sequences B.
    pub batch: usize,
    /// Queries L of a sequence.
    pub queries: usize,
    /// Keys T of a sequence, at least L. Query l is at position `T - L + l`, and sees the keys up to there.
    pub keys: usize,
    /// Query heads Hq, a multiple of `kv_heads`.
    pub heads: usize,
    /// Heads Hkv of keys and values. Query head h reads head `h / (Hq / Hkv)`.
    pub kv_heads: usize,
    /// Elements D of a head.
    pub dim: usize,
    /// With a window of w, position p sees `p - w + 1 ..= p` only.
    pub window: Option<usize>,
    /// What scores are multiplied by.
    pub scale: f32,
    /// `[B, L, Hq, D]`.
    pub q: &'a [T],
    /// `[B, Hkv, T, D]`.
    pub k: Heads<'a, T>,
    /// `[B, Hkv, T, D]`.
    pub v: Heads<'a, T>,
}

/// Computes `softmax(q · kᵀ · scale) · v` over the keys that each query sees: `out` becomes `[B, L, Hq, D]`. What it held
/// is gone.
///
/// All arithmetic is in f32; the result is rounded once. How the work is cut depends on the sizes alone, not on the
/// number of threads, and so do the results. A value that is not finite may reach the queries of the same block that
/// come before it.
///
/// # Panics
/// If a size is 0, the sizes contradict each other, or a slice is too short for them.
pub fn attention<T: Element>(set: InstructionSet, args: &Attention<'_, T>, out: &mut Vec<T>) {
    args.check();
    // SAFETY: each row of each head of keys is written, which is all of `[B, L, Hq, D]`.
    unsafe {
        fill(
            out,
            args.q.len(),
            |out| on!(set, isa => run(isa, args, out)),
        )
    };
}

fn run<I: Isa, T: Element>(isa: I, args: &Attention<'_, T>, out: &mut [MaybeUninit<T>]) {
    match args.rows() <= few_rows::MOST {
        true => few_rows::attention(isa, args, out),
        false => many_rows::attention(isa, args, out),
    }
}

impl<T: Element> Attention<'_, T> {
    fn check(&self) {
        let Self {
            batch,
            queries,
            keys,
            heads,
            kv_heads,
            dim,
            ..
        } = *self;
        assert!(batch > 0 && queries > 0 && kv_heads > 0 && dim > 0);
        assert!(keys >= queries, "the queries' own keys are among the keys");
        assert!(heads > 0 && heads.is_multiple_of(kv_heads));
        assert!(
            self.window != Some(0),
            "a query sees at least its own position"
        );
        assert_eq!(
            self.q.len(),
            batch * queries * heads * dim,
            "q is [B, L, Hq, D]"
        );
        for side in [&self.k, &self.v] {
            side.head(batch - 1, kv_heads - 1, keys, dim);
        }
    }

    /// Query heads that share a head of keys.
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Rows of a head of keys: its query heads at all positions.
    fn rows(&self) -> usize {
        self.queries * self.group()
    }

    /// Where row `row` of a head of keys is in `q` and in the result. Rows of one position are neighbours.
    #[inline(always)]
    fn at(&self, batch: usize, kv_head: usize, row: usize) -> usize {
        let (query, head) = (row / self.group(), row % self.group());
        ((batch * self.queries + query) * self.heads + kv_head * self.group() + head) * self.dim
    }

    /// The keys that a row sees.
    #[inline(always)]
    fn seen(&self, row: usize) -> Range<usize> {
        let end = self.keys - self.queries + row / self.group() + 1;
        end.saturating_sub(self.window.unwrap_or(usize::MAX))..end
    }

    /// Products of two numbers, roughly: what tells whether it is worth to wake a thread.
    fn products(&self) -> usize {
        let seen = self.keys.min(self.window.unwrap_or(usize::MAX));
        2 * self.batch * self.kv_heads * self.rows() * seen * self.dim
    }
}

#[cfg(test)]
mod tests;
