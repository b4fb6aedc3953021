//! The most probable token of each sequence, and what the next step needs: its id as an input, and its position.
//!
//! Floor: the logits once; they are in the L2 cache, as the product before has just written them.

use cudarc::driver::CudaStream;

use super::error::Error;
use super::launch::{Launch, args};
use super::library::Module;
use super::rows::{rows_are_aligned, size};
use super::{Address, Float, Gpu};

/// Where the largest of each sequence's logits `[B, V]` is: the first one of equals.
///
/// As Candle's `argmax` on the CPU, which folds with `x < y` from the first logit on: NaN is passed over, but if the
/// first logit is NaN, the answer is 0. The two zeros are equal.
#[derive(Debug, Clone, Copy)]
pub struct Argmax {
    /// Sequences B.
    pub batch: usize,
    /// Logits V of a sequence.
    pub vocab: usize,
    /// `[B, V]`.
    pub logits: Address,
    /// Elements from one sequence's logits to the next one's.
    pub row_stride: usize,
    /// Type of the logits.
    pub float: Float,
    /// Receives the ids, U32 `[B]`.
    pub ids: Address,
    /// Receives the ids too: the input of the next step, U32 `[B]`.
    pub next: Option<Address>,
    /// Of the tokens that these logits follow, U32 `[B]`: each is increased by one. With `next`, a captured graph of a
    /// step can be replayed with no work on the host. Kernels that read positions early must not be in flight with this
    /// one: the first launch of the next step is not a dependent one, unless each step is a graph of its own.
    pub positions: Option<Address>,
    /// U32, which becomes 1 if a logit is NaN or infinite, and is left alone otherwise.
    pub not_finite: Option<Address>,
    /// [`argmax_scratch`] bytes for `batch` or more, a multiple of 16, all zero before the first use. Calls of one
    /// stream may share it.
    pub scratch: Address,
    /// Whether the launch may overlap the kernel before it: see [dependent launches](super#dependent-launches).
    pub dependent: bool,
}

/// Device twin: `Argmax` in `kernels/argmax.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Params {
    logits: Address,
    ids: Address,
    next: Address,
    positions: Address,
    not_finite: Address,
    scratch: Address,
    stride: u64,
    len: u32,
    parts: u32,
    each: u32,
    aligned: u32,
}

/// Elements that a thread handles at once, and threads of a block. Device twins: in `kernels/argmax.cu`.
const PIECE: usize = 8;
const THREADS: usize = 256;
/// Elements of a block, if that makes no more than `MOST_PARTS` of a sequence: what all its threads have under way.
const EACH: usize = 2 * THREADS * PIECE;
/// Blocks that share a sequence, at most. Device twin: in `kernels/argmax.cu`.
const MOST_PARTS: usize = 64;
/// Device twin: `Scratch` in `kernels/argmax.cu`.
const SCRATCH_ROW: usize = 16 + MOST_PARTS * 8;

/// Bytes of [`Argmax::scratch`].
pub fn argmax_scratch(batch: usize) -> usize {
    batch * SCRATCH_ROW
}

/// Blocks that share a sequence, and elements of each.
fn parts(vocab: usize) -> (usize, usize) {
    let parts = vocab.div_ceil(EACH).min(MOST_PARTS);
    let each = vocab.div_ceil(parts).next_multiple_of(PIECE);
    // Rounded up, fewer may do.
    (vocab.div_ceil(each), each)
}

/// Chooses tokens.
///
/// # Errors
/// If the device has no FP8 units or the driver refuses the launch.
///
/// # Panics
/// If `vocab` is 0, the stride is below it, the scratch does not start at a multiple of 16, or sizes do not fit 31
/// bits.
///
/// # Safety
/// The addresses are of memory of the stream's device, as large as the sizes say, aligned to their elements, and valid
/// until the stream has passed the launch; what is written overlaps nothing else; and the scratch and positions are as
/// [`Argmax`] says.
pub unsafe fn argmax(stream: &CudaStream, args: &Argmax) -> Result<(), Error> {
    Gpu::of(stream)?;
    let &Argmax { vocab, float, .. } = args;
    assert!(vocab > 0, "there is a token");
    assert!(args.row_stride >= vocab, "logits fit their stride");
    assert_eq!(args.scratch % 16, 0, "scratch starts at a multiple of 16");
    let (parts, each) = parts(vocab);
    let aligned = rows_are_aligned(args.logits, args.row_stride * float.size(), 16);
    let params = Params {
        logits: args.logits,
        ids: args.ids,
        next: args.next.unwrap_or(0),
        positions: args.positions.unwrap_or(0),
        not_finite: args.not_finite.unwrap_or(0),
        scratch: args.scratch,
        stride: args.row_stride as u64,
        len: size(vocab),
        parts: size(parts),
        each: size(each),
        aligned: u32::from(aligned),
    };
    let launch = Launch {
        grid: [size(args.batch * parts), 1, 1],
        threads: size(THREADS),
        shared: 0,
        cluster: 1,
        dependent: args.dependent,
    };
    let kernel = Module::Argmax.kernel(match float {
        Float::Bf16 => "argmax_bf16",
        Float::F16 => "argmax_f16",
        Float::F32 => "argmax_f32",
    })?;
    // SAFETY: the kernel takes these arguments; the caller vouches for the memory.
    unsafe { launch.run(stream, kernel, args![&params]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_a_row() {
        let small = 1..10_000;
        for vocab in small.chain([32_000, 128_256, 151_936, 262_144, 262_145, 1_000_001]) {
            let (parts, each) = parts(vocab);
            assert!((1..=MOST_PARTS).contains(&parts) && each.is_multiple_of(PIECE));
            // None is empty.
            assert!(
                parts * each >= vocab && (parts - 1) * each < vocab,
                "{vocab}"
            );
        }
        assert_eq!(parts(128_256).0, 32);
    }
}
