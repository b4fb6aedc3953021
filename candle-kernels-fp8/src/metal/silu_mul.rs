//! `silu(gate) · up`, quantized at once if asked for. Floor: both inputs are read and the results written once.

use super::float::by_float;
use super::launch::word;
use super::rows::threads;
use super::{Binding, Float, Launch, Library, Output, Queue, Slice};

/// `T(gate / (1 + e^-gate) · up)` of rows `[m, k]`.
#[derive(Debug)]
pub struct SiluMul<'a, B> {
    /// Rows.
    pub m: usize,
    /// Elements of a row.
    pub k: usize,
    /// `[m, k]`.
    pub gate: Slice<'a, B>,
    /// Elements from one row of `gate` to the next.
    pub gate_stride: usize,
    /// `[m, k]`.
    pub up: Slice<'a, B>,
    /// Elements from one row of `up` to the next.
    pub up_stride: usize,
    /// Type of inputs and values.
    pub float: Float,
    /// Where the results go; overlaps nothing that is read.
    pub out: Output<'a, B>,
}

/// Computes the inner activations of a gated MLP.
///
/// # Errors
/// If the queue refuses the launch.
///
/// # Panics
/// If `k` or a group is 0, a stride is below `k`, a scale is not positive and finite, or sizes do not fit 32 bits.
pub fn silu_mul<Q: Queue>(queue: &Q, args: &SiluMul<'_, Q::Buffer>) -> Result<(), Q::Error> {
    let &SiluMul { m, k, .. } = args;
    let out = args.out.words(k);
    let [to, scales] = args.out.bindings();
    assert!(
        args.gate_stride >= k && args.up_stride >= k,
        "rows fit their strides"
    );
    if m == 0 {
        return Ok(());
    }
    let mut words = [0; 8];
    words[..6].copy_from_slice(&out);
    words[6] = word(args.gate_stride);
    words[7] = word(args.up_stride);
    queue.launch(&Launch {
        library: Library::SiluMul,
        kernel: by_float!(args.float, "silu_mul_", ""),
        words: &words,
        buffers: &[Binding::Read(args.gate), Binding::Read(args.up), to, scales],
        groups: m,
        threads: threads(k),
    })
}
