//! E4M3 to other float types and back, without a scale.

use cudarc::driver::CudaStream;

use super::error::Error;
use super::launch::{Launch, args};
use super::library::Module;
use super::{Address, Float, Gpu};

/// Threads of a block, and elements that each handles (`DEPTH` pieces in `kernels/cast.cu`).
const THREADS: u32 = 256;
const EACH: usize = 32;

/// Writes the code of each of `count` values: the nearest, beyond ±448 that of ±448, a NaN of either sign for NaN
/// (otherwise as [`encode`](crate::e4m3::encode)).
///
/// # Errors
/// If the device has no FP8 units or the driver refuses the launch.
///
/// # Panics
/// If there are more values than blocks can be launched for.
///
/// # Safety
/// The addresses are of memory of the stream's device, of `count` elements each, aligned to them, and valid until the
/// stream has passed the launch; they do not overlap.
pub unsafe fn cast_to_e4m3(
    stream: &CudaStream,
    (values, float): (Address, Float),
    codes: Address,
    count: usize,
    dependent: bool,
) -> Result<(), Error> {
    let kernel = match float {
        Float::Bf16 => "cast_bf16_to_e4m3",
        Float::F16 => "cast_f16_to_e4m3",
        Float::F32 => "cast_f32_to_e4m3",
    };
    let aligned = u32::from(values.is_multiple_of(16) && codes.is_multiple_of(8));
    // SAFETY: the caller's promise.
    unsafe { launch(stream, kernel, (values, codes), count, aligned, dependent) }
}

/// Writes the value of each of `count` codes, exactly.
///
/// # Errors
/// As [`cast_to_e4m3`].
///
/// # Panics
/// As [`cast_to_e4m3`].
///
/// # Safety
/// As [`cast_to_e4m3`].
pub unsafe fn cast_from_e4m3(
    stream: &CudaStream,
    codes: Address,
    (values, float): (Address, Float),
    count: usize,
    dependent: bool,
) -> Result<(), Error> {
    let kernel = match float {
        Float::Bf16 => "cast_e4m3_to_bf16",
        Float::F16 => "cast_e4m3_to_f16",
        Float::F32 => "cast_e4m3_to_f32",
    };
    let aligned = u32::from(values.is_multiple_of(16) && codes.is_multiple_of(8));
    // SAFETY: the caller's promise.
    unsafe { launch(stream, kernel, (codes, values), count, aligned, dependent) }
}

/// # Safety
/// As [`cast_to_e4m3`]; the kernel is of this module's.
unsafe fn launch(
    stream: &CudaStream,
    kernel: &'static str,
    (from, to): (Address, Address),
    count: usize,
    aligned: u32,
    dependent: bool,
) -> Result<(), Error> {
    Gpu::of(stream)?;
    let blocks = count.div_ceil(THREADS as usize * EACH);
    let launch = Launch {
        grid: [
            i32::try_from(blocks).expect("blocks fit 31 bits") as u32,
            1,
            1,
        ],
        threads: THREADS,
        shared: 0,
        cluster: 1,
        dependent,
    };
    let kernel = Module::Cast.kernel(kernel)?;
    let count = count as u64;
    // SAFETY: the kernel takes these arguments; the caller vouches for the memory.
    unsafe { launch.run(stream, kernel, args![&from, &to, &count, &aligned]) }
}
