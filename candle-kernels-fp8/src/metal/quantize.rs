//! Activations to E4M3, with the arithmetic of the CPU: the same codes and scales, bit by bit (the sign of NaN aside).
//!
//! Floor: values are read once and codes written once.

use super::float::by_float;
use super::launch::word;
use super::rows::{tensor_words, threads};
use super::{Binding, Float, Launch, Library, Output, Quantization, Queue, Slice};

/// A quantization of activations `[m, k]`.
#[derive(Debug)]
pub struct Quantize<'a, B> {
    /// Rows.
    pub m: usize,
    /// Elements of a row.
    pub k: usize,
    /// `[m, k]`.
    pub x: Slice<'a, B>,
    /// Type of `x`.
    pub float: Float,
    /// Elements from one row of `x` to the next.
    pub row_stride: usize,
    /// Receives E4M3 `[m, k]`.
    pub codes: Slice<'a, B>,
    /// Bytes from one row of codes to the next, at least `k`. What lies between rows, and behind the last one, becomes
    /// zero.
    pub codes_stride: usize,
    /// The scales, and where they go.
    pub quantization: Quantization<'a, B>,
}

/// A quantization of activations `[m, k]` with one scale, computed from them.
#[derive(Debug)]
pub struct QuantizeTensor<'a, B> {
    /// Rows.
    pub m: usize,
    /// Elements of a row.
    pub k: usize,
    /// `[m, k]`.
    pub x: Slice<'a, B>,
    /// Type of `x`.
    pub float: Float,
    /// Elements from one row of `x` to the next.
    pub row_stride: usize,
    /// Receives E4M3 `[m, k]`.
    pub codes: Slice<'a, B>,
    /// Bytes from one row of codes to the next, at least `k`. What lies between rows, and behind the last one, becomes
    /// zero.
    pub codes_stride: usize,
    /// F32 `[TENSOR_SCALES]`, the last of which receives the scale; the others hold what they did, or anything.
    pub scales: Slice<'a, B>,
}

/// Elements of [`QuantizeTensor::scales`].
pub const TENSOR_SCALES: usize = MOST_PARTIAL + 1;
/// Groups that look for the largest magnitude.
const MOST_PARTIAL: usize = 256;

/// Quantizes with a scale for each row or group, or with one that is given.
///
/// # Errors
/// If the queue refuses the launch.
///
/// # Panics
/// If `k` or a group is 0, a stride is below `k`, a scale is not positive and finite, or sizes do not fit 32 bits.
pub fn quantize<Q: Queue>(queue: &Q, args: &Quantize<'_, Q::Buffer>) -> Result<(), Q::Error> {
    let out = Output::Codes {
        codes: args.codes,
        stride: args.codes_stride,
        quantization: args.quantization,
    };
    let words = out.words(args.k);
    let [to, scales] = out.bindings();
    let rows = (args.m, args.k, args.row_stride);
    launch(queue, rows, (args.x, args.float), words, [to, scales])
}

/// Quantizes with one scale for all rows, in two kernels. Writes nothing, not even the scale, if there are no rows.
///
/// # Errors
/// As [`quantize`].
///
/// # Panics
/// As [`quantize`].
pub fn quantize_tensor<Q: Queue>(
    queue: &Q,
    args: &QuantizeTensor<'_, Q::Buffer>,
) -> Result<(), Q::Error> {
    let &QuantizeTensor { m, k, .. } = args;
    if m == 0 {
        return Ok(());
    }
    // The partial magnitudes are the last ones before the scale.
    let partial = m.min(MOST_PARTIAL);
    let magnitudes = args
        .scales
        .after((MOST_PARTIAL - partial) * size_of::<f32>());
    let words = tensor_words(k, args.codes_stride, partial);
    queue.launch(&Launch {
        library: Library::Quantize,
        kernel: by_float!(args.float, "quantize_", "_amax"),
        words: &[word(m), word(k), word(args.row_stride)],
        buffers: &[Binding::Read(args.x), Binding::Write(magnitudes)],
        groups: partial,
        threads: threads(k),
    })?;
    let to = [args.codes, magnitudes].map(Binding::Write);
    launch(
        queue,
        (m, k, args.row_stride),
        (args.x, args.float),
        words,
        to,
    )
}

/// Device twin of the words: `Quantize` in `kernels/quantize.metal`.
fn launch<Q: Queue>(
    queue: &Q,
    (m, k, stride): (usize, usize, usize),
    (x, float): (Slice<'_, Q::Buffer>, Float),
    words: [u32; 6],
    [to, scales]: [Binding<'_, Q::Buffer>; 2],
) -> Result<(), Q::Error> {
    assert!(stride >= k, "rows fit their stride");
    if m == 0 {
        return Ok(());
    }
    let mut all = [word(stride); 7];
    all[..6].copy_from_slice(&words);
    queue.launch(&Launch {
        library: Library::Quantize,
        kernel: by_float!(float, "quantize_", ""),
        words: &all,
        buffers: &[Binding::Read(x), to, scales],
        groups: m,
        threads: threads(k),
    })
}
