//! Values through E4M3 and back, in the arithmetic of the CPU ([`fake_quantize`](crate::cpu::fake_quantize)).

use cudarc::driver::CudaStream;

use super::error::Error;
use super::launch::{Launch, args};
use super::library::Module;
use super::{Address, Float, Gpu};

/// `decode(encode(x / scale)) · scale` of each of `count` values.
#[derive(Debug, Clone, Copy)]
pub struct FakeQuantize {
    /// Values.
    pub count: usize,
    /// `[count]`.
    pub x: Address,
    /// Type of `x` and `out`.
    pub float: Float,
    /// F32 `[scale_count]`: runs of values have one each, and when there are no more, the first comes again.
    pub scales: Address,
    /// Scales, at least one.
    pub scale_count: usize,
    /// Neighbouring values that share a scale, at least one.
    pub run: usize,
    /// Receives `[count]`; may be `x`.
    pub out: Address,
    /// Whether the launch may overlap the kernel before it; this one waits for it before it reads anything.
    pub dependent: bool,
}

/// Device twin: `FakeQuantize` in `kernels/fake_quantize.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Params {
    x: Address,
    scales: Address,
    out: Address,
    count: u64,
    run: u64,
    scale_count: u64,
}

const THREADS: u32 = 256;
/// Blocks at most, which then take several turns.
const MOST_BLOCKS: usize = 1 << 16;

/// Rounds values through E4M3.
///
/// # Errors
/// If the device has no FP8 units or the driver refuses the launch.
///
/// # Panics
/// If there is no scale, or runs are empty.
///
/// # Safety
/// The addresses are of memory of the stream's device, as large as the sizes say, aligned to their elements, and valid
/// until the stream has passed the launch; `out` overlaps nothing that is read, unless it is `x`.
pub unsafe fn fake_quantize(stream: &CudaStream, args: &FakeQuantize) -> Result<(), Error> {
    assert!(
        args.scale_count > 0 && args.run > 0,
        "every value has a scale"
    );
    Gpu::of(stream)?;
    let blocks = args.count.div_ceil(THREADS as usize).min(MOST_BLOCKS);
    let launch = Launch {
        grid: [blocks as u32, 1, 1],
        threads: THREADS,
        shared: 0,
        cluster: 1,
        dependent: args.dependent,
    };
    let params = Params {
        x: args.x,
        scales: args.scales,
        out: args.out,
        count: args.count as u64,
        run: args.run as u64,
        scale_count: args.scale_count as u64,
    };
    let kernel = Module::FakeQuantize.kernel(match args.float {
        Float::Bf16 => "fake_quantize_bf16",
        Float::F16 => "fake_quantize_f16",
        Float::F32 => "fake_quantize_f32",
    })?;
    // SAFETY: the kernel takes these arguments; the caller vouches for the memory.
    unsafe { launch.run(stream, kernel, args![&params]) }
}
