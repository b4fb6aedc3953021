//! RMS norm of rows, and of the sum of rows and a residual, quantized at once if asked for.
//!
//! Floor: each input is read once and the results are written once.

use super::float::by_float;
use super::launch::word;
use super::rows::threads;
use super::{Binding, Float, Launch, Library, Output, Queue, Slice};

/// `weight · T(x / √(mean(x²) + eps))` of each row of `[m, k]`.
#[derive(Debug)]
pub struct RmsNorm<'a, B> {
    /// Rows.
    pub m: usize,
    /// Elements of a row.
    pub k: usize,
    /// `[m, k]`.
    pub x: Slice<'a, B>,
    /// Elements from one row of `x` to the next.
    pub row_stride: usize,
    /// What is added to `x` first.
    pub residual: Option<Residual<'a, B>>,
    /// `[k]`.
    pub weight: Slice<'a, B>,
    /// Added to the mean.
    pub eps: f32,
    /// Type of inputs, sum and values.
    pub float: Float,
    /// Where the results go; overlaps nothing that is read.
    pub out: Output<'a, B>,
}

/// A residual `[m, k]`, and where its sum with the activations goes.
#[derive(Debug)]
pub struct Residual<'a, B> {
    /// `[m, k]`.
    pub values: Slice<'a, B>,
    /// Elements from one row to the next.
    pub stride: usize,
    /// Receives `T(x + residual)`, `[m, k]`; overlaps nothing that is read.
    pub sum: Slice<'a, B>,
    /// Elements from one row of the sum to the next.
    pub sum_stride: usize,
}

/// Takes the norm of rows.
///
/// # Errors
/// If the queue refuses the launch.
///
/// # Panics
/// If `k` or a group is 0, a stride is below `k`, a scale is not positive and finite, or sizes do not fit 32 bits.
pub fn rms_norm<Q: Queue>(queue: &Q, args: &RmsNorm<'_, Q::Buffer>) -> Result<(), Q::Error> {
    let &RmsNorm { m, k, .. } = args;
    let out = args.out.words(k);
    let [to, scales] = args.out.bindings();
    // Others stand in for what is neither read nor written.
    let (residual, sum, strides) = match &args.residual {
        Some(residual) => (
            residual.values,
            Binding::Write(residual.sum),
            [args.row_stride, residual.stride, residual.sum_stride],
        ),
        None => (args.x, to, [args.row_stride, k, k]),
    };
    assert!(
        strides.iter().all(|&stride| stride >= k),
        "rows fit their strides"
    );
    if m == 0 {
        return Ok(());
    }
    let mut words = [0; 11];
    words[..6].copy_from_slice(&out);
    words[6..9].copy_from_slice(&strides.map(word));
    words[9] = u32::from(args.residual.is_some());
    words[10] = args.eps.to_bits();
    queue.launch(&Launch {
        library: Library::RmsNorm,
        kernel: by_float!(args.float, "rms_norm_", ""),
        words: &words,
        buffers: &[
            Binding::Read(args.x),
            Binding::Read(residual),
            Binding::Read(args.weight),
            to,
            scales,
            sum,
        ],
        groups: m,
        threads: threads(k),
    })
}
