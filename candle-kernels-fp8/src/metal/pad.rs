//! Rows to where they start at multiples of 16 bytes.

use super::launch::{threads_for, word};
use super::{Binding, Launch, Library, Queue, Slice};

/// Bytes from one row of `k` bytes to the next in what [`pad_rows`] writes.
pub fn padded(k: usize) -> usize {
    k.next_multiple_of(16)
}

/// Copies `rows` of `k` bytes, which are `stride` apart, to where they are [`padded`] apart, with zeros between them.
///
/// # Errors
/// If the queue refuses the launch.
///
/// # Panics
/// If the stride is below `k` or sizes do not fit 32 bits.
pub fn pad_rows<Q: Queue>(
    queue: &Q,
    (from, stride): (Slice<'_, Q::Buffer>, usize),
    to: Slice<'_, Q::Buffer>,
    (rows, k): (usize, usize),
) -> Result<(), Q::Error> {
    assert!(stride >= k, "rows fit their stride");
    if rows == 0 || k == 0 {
        return Ok(());
    }
    queue.launch(&Launch {
        library: Library::Pad,
        kernel: "pad_rows",
        words: &[word(k), word(stride), word(padded(k))],
        buffers: &[Binding::Read(from), Binding::Write(to)],
        groups: rows,
        threads: threads_for(padded(k), 256),
    })
}
