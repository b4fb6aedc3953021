//! E4M3 to other float types and back. Floor: each element is read and written once.

use super::float::by_float;
use super::launch::word;
use super::{Binding, Float, Launch, Library, Queue, Slice};

const THREADS: usize = 256;
/// Elements of a thread, as device code says.
const EACH: usize = 8;

/// Rounds `count` values to E4M3: to nearest, ties to even, clamped to ±448. NaN stays NaN.
///
/// `from`: values of a type; `to` receives the codes.
///
/// # Errors
/// If the queue refuses the launch.
///
/// # Panics
/// If the count does not fit 32 bits.
pub fn cast_to_e4m3<Q: Queue>(
    queue: &Q,
    (from, float): (Slice<'_, Q::Buffer>, Float),
    to: Slice<'_, Q::Buffer>,
    count: usize,
) -> Result<(), Q::Error> {
    launch(
        queue,
        by_float!(float, "cast_", "_to_e4m3"),
        from,
        to,
        count,
    )
}

/// The values of `count` codes, exactly.
///
/// # Errors
/// As [`cast_to_e4m3`].
///
/// # Panics
/// As [`cast_to_e4m3`].
pub fn cast_from_e4m3<Q: Queue>(
    queue: &Q,
    from: Slice<'_, Q::Buffer>,
    (to, float): (Slice<'_, Q::Buffer>, Float),
    count: usize,
) -> Result<(), Q::Error> {
    launch(
        queue,
        by_float!(float, "cast_e4m3_to_", ""),
        from,
        to,
        count,
    )
}

fn launch<Q: Queue>(
    queue: &Q,
    kernel: &'static str,
    from: Slice<'_, Q::Buffer>,
    to: Slice<'_, Q::Buffer>,
    count: usize,
) -> Result<(), Q::Error> {
    if count == 0 {
        return Ok(());
    }
    queue.launch(&Launch {
        library: Library::Cast,
        kernel,
        words: &[word(count)],
        buffers: &[Binding::Read(from), Binding::Write(to)],
        groups: count.div_ceil(THREADS * EACH),
        threads: THREADS,
    })
}
