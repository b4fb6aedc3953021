//! What the machine can do at most: the two ceilings that kernels are measured against.

use super::isa::Job;
use super::isa::{InstructionSet, Isa, on};
use super::matmul::share;
use std::time::Instant;

/// Bytes that a thread reads before it takes the next piece.
const PIECE: usize = 1 << 20;

/// Bytes a second of reading `buffer` once, in order, on all of the pool's threads, doing next to nothing with it.
///
/// Take a buffer that no cache holds, and the best of a few calls.
pub fn read_bandwidth(buffer: &[u64]) -> f64 {
    let set = InstructionSet::best();
    let pieces: Vec<&[u64]> = buffer.chunks(PIECE / 8).collect();
    let start = Instant::now();
    share(
        pieces.len(),
        || (),
        |(), piece| {
            std::hint::black_box(on!(set, isa => isa.vectorize(Sum { isa, words: pieces[piece] })));
        },
    );
    size_of_val(buffer) as f64 / start.elapsed().as_secs_f64()
}

struct Sum<'a, I> {
    isa: I,
    words: &'a [u64],
}

/// Bytes by which the read asks for lines ahead of their use.
const AHEAD: usize = 4096;

impl<I: Isa> Job for Sum<'_, I> {
    type Output = u64;

    #[inline(always)]
    fn run(self) -> u64 {
        let mut sum = 0u64;
        for lines in self.words.chunks(32) {
            for line in lines.chunks(8) {
                self.isa.prefetch(line.as_ptr().wrapping_add(AHEAD / 8));
            }
            sum = lines.iter().fold(sum, |sum, word| sum.wrapping_add(*word));
        }
        sum
    }
}

/// Floating-point operations a second of the multiply-add that matmuls use here, from registers alone, on all of the
/// pool's threads. Takes about `seconds`.
pub fn multiply_rate(seconds: f64) -> f64 {
    const ROUNDS: usize = 1 << 16;
    let set = InstructionSet::best();
    let total = std::sync::atomic::AtomicU64::new(0);
    let start = Instant::now();
    let threads = rayon::current_num_threads();
    share(
        threads,
        || (),
        |(), _| {
            while start.elapsed().as_secs_f64() < seconds {
                let operations = on!(set, isa => isa.multiply(ROUNDS));
                total.fetch_add(operations, std::sync::atomic::Ordering::Relaxed);
            }
        },
    );
    total.into_inner() as f64 / start.elapsed().as_secs_f64()
}
