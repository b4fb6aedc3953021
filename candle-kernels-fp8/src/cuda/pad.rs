//! Rows moved apart, so that each starts at a multiple of 16 bytes, as matrix products ask for of activations, and of
//! weights in rows.

use cudarc::driver::CudaStream;

use super::error::Error;
use super::launch::{Launch, args};
use super::library::Module;
use super::rows::size;
use super::{Address, Gpu};

/// Bytes from one row of `k` bytes to the next, where rows start at multiples of 16 bytes.
pub fn padded(k: usize) -> usize {
    k.next_multiple_of(16)
}

/// Copies `rows` rows of `k` bytes, `stride` apart, to rows that are [`padded(k)`](padded) apart, with zeros between
/// them and behind the last one.
///
/// # Errors
/// If the device has no FP8 units or the driver refuses the launch.
///
/// # Panics
/// If the stride is below `k`, `to` is no multiple of 16, or sizes do not fit 31 bits.
///
/// # Safety
/// The addresses are of memory of the stream's device, as large as the sizes say, and valid until the stream has passed
/// the launch; they do not overlap.
pub unsafe fn pad_rows(
    stream: &CudaStream,
    (from, stride): (Address, usize),
    to: Address,
    (rows, k): (usize, usize),
    dependent: bool,
) -> Result<(), Error> {
    assert!(stride >= k, "rows of {k} fit their stride of {stride}");
    assert_eq!(to % 16, 0, "matrices start at multiples of 16 bytes");
    Gpu::of(stream)?;
    let pieces = padded(k) / 16;
    let launch = Launch {
        grid: [size(rows), 1, 1],
        threads: size(pieces.next_multiple_of(32).clamp(32, 256)),
        shared: 0,
        cluster: 1,
        dependent,
    };
    let kernel = Module::Pad.kernel("pad_rows")?;
    let (stride, to_stride, k) = (stride as u64, size(padded(k)), size(k));
    // SAFETY: the kernel takes these arguments; the caller vouches for the memory.
    unsafe { launch.run(stream, kernel, args![&from, &stride, &to, &to_stride, &k]) }
}
