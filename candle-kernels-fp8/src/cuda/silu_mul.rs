//! `silu(gate) · up`, the inner activation of a gated MLP, and the same with its result quantized.
//!
//! In f32, within a few roundings of the CPU ([`silu_mul`](crate::cpu::silu_mul)), then rounded to the element type.
//! What is quantized is the rounded result: quantizing at once gives the same codes as doing it afterwards.
//!
//! Floor: two values are read and one, or one code, written.

use cudarc::driver::CudaStream;

use super::error::Error;
use super::launch::args;
use super::library::Module;
use super::rows::{Choice, Output, kernel_name, rows_are_aligned};
use super::{Address, Float, Gpu};

/// `gate / (1 + exp(-gate)) · up`, elementwise in `[m, k]`.
#[derive(Debug, Clone, Copy)]
pub struct SiluMul {
    /// Rows.
    pub m: usize,
    /// Elements of a row.
    pub k: usize,
    /// `[m, k]`.
    pub gate: Address,
    /// Elements from one row of `gate` to the next: 2 · `k` where one matrix `[m, 2 · k]` holds both.
    pub gate_stride: usize,
    /// `[m, k]`.
    pub up: Address,
    /// Elements from one row of `up` to the next.
    pub up_stride: usize,
    /// Type of `gate` and `up`.
    pub float: Float,
    /// Receives the result.
    pub out: Output,
    /// Whether the launch may overlap the kernel before it: see [dependent launches](super#dependent-launches).
    pub dependent: bool,
}

/// Device twin: `Input` in `kernels/silu_mul.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Input {
    gate: Address,
    up: Address,
    gate_stride: u64,
    up_stride: u64,
}

/// How much longer than quantizing this takes.
const EFFORT: usize = 3;

/// Applies the activation.
///
/// # Errors
/// If the device has no FP8 units or the driver refuses the launch.
///
/// # Panics
/// If `k` or a group is 0, a stride is below `k`, a scale is not positive and finite, or sizes do not fit 31 bits.
///
/// # Safety
/// The addresses are of memory of the stream's device, as large as the sizes and strides say, aligned to their
/// elements, and valid until the stream has passed the launch; what is written overlaps nothing that is read.
pub unsafe fn silu_mul(stream: &CudaStream, args: &SiluMul) -> Result<(), Error> {
    let &SiluMul { m, k, float, .. } = args;
    let rows = [(args.gate, args.gate_stride), (args.up, args.up_stride)];
    for (_, stride) in rows {
        assert!(stride >= k, "rows of {k} fit their stride of {stride}");
    }
    let are_aligned = |&(address, stride): &_| rows_are_aligned(address, stride * float.size(), 16);
    let aligned = rows.iter().all(are_aligned) && args.out.is_aligned(float);
    let choice = Choice::new(
        Gpu::of(stream)?,
        (m, k),
        aligned,
        args.out.reduces(),
        EFFORT,
    );
    let params = args.out.params((m, k), choice.shape);
    let input = Input {
        gate: args.gate,
        up: args.up,
        gate_stride: args.gate_stride as u64,
        up_stride: args.up_stride as u64,
    };
    let kernel = Module::SiluMul.kernel(kernel_name!("silu_mul", float, choice.variant))?;
    let launch = choice.launch(args.dependent);
    // SAFETY: the kernel takes these arguments; the caller vouches for the memory.
    unsafe { launch.run(stream, kernel, args![&input, &params]) }
}
