//! Values through E4M3 and back. Floor: each is read and written once.

use super::float::by_float;
use super::launch::word;
use super::{Binding, Float, Launch, Library, Queue, Slice};

const THREADS: usize = 256;

/// Values rounded through E4M3: `decode(encode(x / scale)) · scale`, in f32.
#[derive(Debug)]
pub struct FakeQuantize<'a, B> {
    /// Elements.
    pub count: usize,
    /// Values.
    pub x: Slice<'a, B>,
    /// Type of values and results.
    pub float: Float,
    /// F32, positive: that of element `i` is number `i / run % scale_count`.
    pub scales: Slice<'a, B>,
    /// Not 0.
    pub scale_count: usize,
    /// Neighbours that share a scale; not 0.
    pub run: usize,
    /// Receives the results.
    pub out: Slice<'a, B>,
}

/// Rounds values through E4M3.
///
/// # Errors
/// If the queue refuses the launch.
///
/// # Panics
/// If `run` or `scale_count` is 0, or sizes do not fit 32 bits.
pub fn fake_quantize<Q: Queue>(
    queue: &Q,
    args: &FakeQuantize<'_, Q::Buffer>,
) -> Result<(), Q::Error> {
    assert!(args.run > 0 && args.scale_count > 0, "there are scales");
    if args.count == 0 {
        return Ok(());
    }
    queue.launch(&Launch {
        library: Library::FakeQuantize,
        kernel: by_float!(args.float, "fake_quantize_", ""),
        words: &[word(args.count), word(args.run), word(args.scale_count)],
        buffers: &[
            Binding::Read(args.x),
            Binding::Read(args.scales),
            Binding::Write(args.out),
        ],
        groups: args.count.div_ceil(THREADS),
        threads: THREADS,
    })
}
