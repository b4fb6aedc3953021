//! What a device's memory gives: the floor of kernels that are bound by it.

use cudarc::driver::CudaStream;

use super::error::Error;
use super::launch::{Launch, args};
use super::library::Module;
use super::{Address, Gpu};

/// Reads `bytes` bytes, a multiple of 16, and does nothing else. `blocks` for each multiprocessor share them out; `scratch`
/// is four bytes that may be overwritten.
///
/// # Errors
/// If the device has no FP8 units or the driver refuses the launch.
///
/// # Safety
/// The memory is that of the stream's device, and valid until the stream has passed the launch.
pub unsafe fn read(
    stream: &CudaStream,
    (from, bytes): (Address, usize),
    scratch: Address,
    blocks: u32,
    dependent: bool,
) -> Result<(), Error> {
    let gpu = Gpu::of(stream)?;
    let pieces = (bytes / 16) as u64;
    // No more threads than pieces, so that small reads start few blocks.
    let most = pieces.div_ceil(8 * 256) as u32;
    let launch = Launch {
        grid: [(gpu.processors * blocks).min(most), 1, 1],
        threads: 256,
        shared: 0,
        cluster: 1,
        dependent,
    };
    let kernel = Module::Probe.kernel("probe_read")?;
    // SAFETY: the kernel takes these arguments; the caller vouches for the memory.
    unsafe { launch.run(stream, kernel, args![&from, &pieces, &scratch]) }
}
