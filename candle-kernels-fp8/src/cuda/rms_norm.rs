//! RMS norm of rows, of sums of rows, and either with its result quantized.
//!
//! Rounds where the CPU does ([`rms_norm`](crate::cpu::rms_norm)): the quotient to the row's type, then its product
//! with the weight. The squares are added in another order, so that results may differ by a rounding. What is quantized
//! is the rounded result: quantizing while normalizing gives the same codes as doing one after the other (where rows
//! start at multiples of 16 bytes, codes at multiples of 8, and groups are powers of two from 8 to 256; else one of the
//! two may be served by a kernel that adds in yet another order).
//!
//! Floor: a row is read once and written once, with a residual two rows more; the weight stays in the caches.

use cudarc::driver::CudaStream;

use super::error::Error;
use super::launch::args;
use super::library::Module;
use super::rows::{Choice, Output, kernel_name, rows_are_aligned};
use super::{Address, Float, Gpu};

/// What is added to rows before they are normalized.
#[derive(Debug, Clone, Copy)]
pub struct Residual {
    /// `[m, k]`.
    pub values: Address,
    /// Elements from one row to the next.
    pub stride: usize,
    /// Receives the sum `[m, k]`, rounded; may be the residual or `x` itself, with the same stride.
    pub sum: Address,
    /// Elements from one row of `sum` to the next.
    pub sum_stride: usize,
}

/// `weight · T(x / √(mean(x²) + eps))` for each row of `x [m, k]`, or of `x` plus a residual.
#[derive(Debug, Clone, Copy)]
pub struct RmsNorm {
    /// Rows.
    pub m: usize,
    /// Elements of a row.
    pub k: usize,
    /// `[m, k]`.
    pub x: Address,
    /// Elements from one row of `x` to the next.
    pub row_stride: usize,
    /// Added to `x`.
    pub residual: Option<Residual>,
    /// `[k]`.
    pub weight: Address,
    /// Added to the mean of the squares.
    pub eps: f32,
    /// Type of `x`, the residual, the sum and the weight: T.
    pub float: Float,
    /// Receives the result.
    pub out: Output,
    /// Whether the launch may overlap the kernel before it: see [dependent launches](super#dependent-launches).
    pub dependent: bool,
}

/// Device twin: `Input` in `kernels/rms_norm.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Input {
    x: Address,
    residual: Address,
    sum: Address,
    weight: Address,
    stride: u64,
    residual_stride: u64,
    sum_stride: u64,
    eps: f32,
}

/// Normalizes rows.
///
/// # Errors
/// If the device has no FP8 units or the driver refuses the launch.
///
/// # Panics
/// If `k` or a group is 0, a stride is below `k`, a scale is not positive and finite, or sizes do not fit 31 bits.
///
/// # Safety
/// The addresses are of memory of the stream's device, as large as the sizes and strides say, aligned to their
/// elements, and valid until the stream has passed the launch; what is written overlaps nothing that is read, but for
/// the sum as [`Residual`] says; and what [dependent launches](super#dependent-launches) ask for holds of the weight.
pub unsafe fn rms_norm(stream: &CudaStream, args: &RmsNorm) -> Result<(), Error> {
    let &RmsNorm { m, k, float, .. } = args;
    let nothing = Residual {
        values: 0,
        stride: k,
        sum: 0,
        sum_stride: k,
    };
    let residual = args.residual.unwrap_or(nothing);
    let rows = [
        (args.x, args.row_stride),
        (residual.values, residual.stride),
        (residual.sum, residual.sum_stride),
        (args.weight, k),
    ];
    for (_, stride) in rows {
        assert!(stride >= k, "rows of {k} fit their stride of {stride}");
    }
    let are_aligned = |&(address, stride): &_| rows_are_aligned(address, stride * float.size(), 16);
    let aligned = rows.iter().all(are_aligned) && args.out.is_aligned(float);
    let choice = Choice::new(Gpu::of(stream)?, (m, k), aligned, true, 1);
    let params = args.out.params((m, k), choice.shape);
    let input = Input {
        x: args.x,
        residual: residual.values,
        sum: residual.sum,
        weight: args.weight,
        stride: args.row_stride as u64,
        residual_stride: residual.stride as u64,
        sum_stride: residual.sum_stride as u64,
        eps: args.eps,
    };
    let kernel = Module::RmsNorm.kernel(kernel_name!("rms_norm", float, choice.variant))?;
    let launch = choice.launch(args.dependent);
    // SAFETY: the kernel takes these arguments; the caller vouches for the memory.
    unsafe { launch.run(stream, kernel, args![&input, &params]) }
}
