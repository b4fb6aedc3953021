//! Codes and scales back to dense weights. Floor: a byte is read and a value written for each weight.

use super::float::by_float;
use super::launch::{threads_for, word};
use super::{Binding, Float, Launch, Library, Queue, Slice};
use crate::ScaleLayout;

/// A dequantization of a weight `[n, k]`: the code times the scale, rounded to the scale's type, then to that of the
/// result.
#[derive(Debug)]
pub struct Dequantize<'a, B> {
    /// Output features.
    pub n: usize,
    /// Input features.
    pub k: usize,
    /// E4M3 `[n, k]`.
    pub codes: Slice<'a, B>,
    /// Bytes from one row of codes to the next.
    pub codes_stride: usize,
    /// F32 values of `scale_float`, as `layout` says; not negative.
    pub scales: Slice<'a, B>,
    /// Layout of `scales`.
    pub layout: ScaleLayout,
    /// The type in which codes and scales are multiplied.
    pub scale_float: Float,
    /// Receives `[n, k]`, dense.
    pub out: Slice<'a, B>,
    /// Type of `out`.
    pub out_float: Float,
}

/// Dequantizes a weight.
///
/// # Errors
/// If the queue refuses the launch.
///
/// # Panics
/// If the stride is below `k` or sizes do not fit 32 bits.
pub fn dequantize<Q: Queue>(queue: &Q, args: &Dequantize<'_, Q::Buffer>) -> Result<(), Q::Error> {
    let &Dequantize { n, k, .. } = args;
    assert!(args.codes_stride >= k, "rows fit their stride");
    if n == 0 || k == 0 {
        return Ok(());
    }
    let [scale_rows, scale_row] = scale_rows(args.layout, n, k);
    queue.launch(&Launch {
        library: Library::Dequantize,
        kernel: by_float!(args.out_float, "dequantize_", ""),
        words: &[
            word(k),
            word(args.codes_stride),
            scale_rows,
            scale_row,
            word(args.layout.run(k)),
            args.scale_float as u32,
        ],
        buffers: &[
            Binding::Read(args.codes),
            Binding::Read(args.scales),
            Binding::Write(args.out),
        ],
        groups: n,
        threads: threads_for(k, 256),
    })
}

/// Rows of a weight that share scales, and scales from one such set of rows to the next.
pub(super) fn scale_rows(layout: ScaleLayout, n: usize, k: usize) -> [u32; 2] {
    match layout {
        ScaleLayout::Tensor => [word(n.max(1)), 0],
        ScaleLayout::Channel => [1, 1],
        ScaleLayout::Block { rows, cols } => [word(rows), word(k.div_ceil(cols))],
    }
}
