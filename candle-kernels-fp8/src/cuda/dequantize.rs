//! Codes and scales back to dense weights, in the arithmetic of the CPU ([`dequantize`](crate::cpu::dequantize)): the
//! code times the scale, rounded in the scale's type; then a cast.

use cudarc::driver::CudaStream;

use super::error::Error;
use super::launch::{Launch, args};
use super::library::Module;
use super::rows::{rows_are_aligned, size};
use super::{Address, Float, Gpu};
use crate::ScaleLayout;

/// A weight `[n, k]` to be written out.
#[derive(Debug, Clone, Copy)]
pub struct Dequantize {
    /// Rows.
    pub n: usize,
    /// Elements of a row.
    pub k: usize,
    /// E4M3 `[n, k]`.
    pub codes: Address,
    /// Bytes from one row of codes to the next.
    pub codes_stride: usize,
    /// F32, as `layout` says.
    pub scales: Address,
    /// Layout of `scales`.
    pub layout: ScaleLayout,
    /// The type that the scales were stored in, to which products are rounded first.
    pub scale_float: Float,
    /// Receives `[n, k]`, dense.
    pub out: Address,
    /// Type of `out`.
    pub out_float: Float,
    /// Whether the launch may overlap the kernel before it; this one waits for it before it reads anything.
    pub dependent: bool,
}

/// Device twin: `Dequantize` in `kernels/dequantize.cu`, which says what the fields mean.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Params {
    codes: Address,
    scales: Address,
    out: Address,
    stride: u64,
    k: u32,
    scale_rows: u32,
    scale_row: u32,
    scale_run: u32,
    scale_float: Float,
    aligned: u32,
}

/// Writes the values of a weight's codes.
///
/// # Errors
/// If the device has no FP8 units or the driver refuses the launch.
///
/// # Panics
/// If `k` or a side of a block is 0, the stride is below `k`, or sizes do not fit 31 bits.
///
/// # Safety
/// The addresses are of memory of the stream's device, as large as the sizes say, aligned to their elements, and valid
/// until the stream has passed the launch; `out` overlaps nothing that is read.
pub unsafe fn dequantize(stream: &CudaStream, args: &Dequantize) -> Result<(), Error> {
    let &Dequantize { n, k, .. } = args;
    assert!(k > 0, "rows are not empty");
    assert!(args.codes_stride >= k, "rows fit their stride");
    Gpu::of(stream)?;
    let (scale_rows, scale_row) = match args.layout {
        ScaleLayout::Tensor => (n.max(1), 0),
        ScaleLayout::Channel => (1, 1),
        ScaleLayout::Block { rows, cols } => {
            assert!(rows > 0 && cols > 0, "blocks are not empty");
            (rows.min(n.max(1)), k.div_ceil(cols))
        }
    };
    let aligned = k.is_multiple_of(8)
        && rows_are_aligned(args.codes, args.codes_stride, 8)
        && rows_are_aligned(args.out, k * args.out_float.size(), 16);
    let params = Params {
        codes: args.codes,
        scales: args.scales,
        out: args.out,
        stride: args.codes_stride as u64,
        k: size(k),
        scale_rows: size(scale_rows),
        scale_row: size(scale_row),
        scale_run: size(args.layout.run(k).min(k)),
        scale_float: args.scale_float,
        aligned: u32::from(aligned),
    };
    let launch = Launch {
        grid: [size(n), 1, 1],
        threads: size(k.div_ceil(8).next_multiple_of(32).min(256)),
        shared: 0,
        cluster: 1,
        dependent: args.dependent,
    };
    let kernel = Module::Dequantize.kernel(match args.out_float {
        Float::Bf16 => "dequantize_bf16",
        Float::F16 => "dequantize_f16",
        Float::F32 => "dequantize_f32",
    })?;
    // SAFETY: the kernel takes these arguments; the caller vouches for the memory.
    unsafe { launch.run(stream, kernel, args![&params]) }
}
