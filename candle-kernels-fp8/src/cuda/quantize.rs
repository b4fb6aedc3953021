//! Activations to E4M3, with the arithmetic of the CPU: the same codes and scales, bit by bit (the sign of NaN aside).
//!
//! Floor: values are read once and codes written once; a token of 4096 is one block's work and takes about as long as
//! an empty kernel.

use cudarc::driver::CudaStream;

use super::error::Error;
use super::launch::{Launch, args};
use super::library::Module;
use super::rows::{Choice, Mode, Output, Quantization, kernel_name, rows_are_aligned, size};
use super::{Address, Float, Gpu};

/// A quantization of activations `[m, k]`.
#[derive(Debug, Clone, Copy)]
pub struct Quantize {
    /// Rows.
    pub m: usize,
    /// Elements of a row.
    pub k: usize,
    /// `[m, k]`.
    pub x: Address,
    /// Type of `x`.
    pub float: Float,
    /// Elements from one row of `x` to the next.
    pub row_stride: usize,
    /// Receives E4M3 `[m, k]`.
    pub codes: Address,
    /// Bytes from one row of codes to the next, at least `k`. What lies between rows, and behind the last one, becomes
    /// zero.
    pub codes_stride: usize,
    /// The scales, and where they go.
    pub quantization: Quantization,
    /// Whether the launch may overlap the kernel before it: see [dependent launches](super#dependent-launches).
    pub dependent: bool,
}

/// A quantization of activations `[m, k]` with one scale, computed from them.
#[derive(Debug, Clone, Copy)]
pub struct QuantizeTensor {
    /// Rows.
    pub m: usize,
    /// Elements of a row.
    pub k: usize,
    /// `[m, k]`.
    pub x: Address,
    /// Type of `x`.
    pub float: Float,
    /// Elements from one row of `x` to the next.
    pub row_stride: usize,
    /// Receives E4M3 `[m, k]`.
    pub codes: Address,
    /// Bytes from one row of codes to the next, at least `k`. What lies between rows, and behind the last one, becomes
    /// zero.
    pub codes_stride: usize,
    /// Receives the scale, F32 `[1]`.
    pub scale: Address,
    /// [`TENSOR_SCRATCH`] bytes for the time of the call; a multiple of 4.
    pub scratch: Address,
    /// Whether the launch may overlap the kernel before it: see [dependent launches](super#dependent-launches).
    pub dependent: bool,
}

/// Bytes of scratch memory that [`quantize_tensor`] asks for.
pub const TENSOR_SCRATCH: usize = MOST_PARTIAL * size_of::<f32>();
/// Blocks that look for the largest magnitude.
const MOST_PARTIAL: usize = 512;
/// Threads of such a block.
const AMAX_THREADS: u32 = 256;

/// Device twin: `Input` in `kernels/quantize.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Input {
    x: Address,
    magnitudes: Address,
    stride: u64,
    count: u32,
}

/// Quantizes with a scale for each row or group, or with one that is given.
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
pub unsafe fn quantize(stream: &CudaStream, args: &Quantize) -> Result<(), Error> {
    let out = Output::Codes {
        codes: args.codes,
        stride: args.codes_stride,
        quantization: args.quantization,
    };
    // SAFETY: the caller's promise.
    unsafe { launch(stream, args, out, None) }
}

/// Quantizes with one scale for all rows, in two kernels. Writes nothing, not even the scale, if there are no rows.
///
/// # Errors
/// As [`quantize`].
///
/// # Panics
/// As [`quantize`].
///
/// # Safety
/// As [`quantize`].
pub unsafe fn quantize_tensor(stream: &CudaStream, args: &QuantizeTensor) -> Result<(), Error> {
    let &QuantizeTensor { m, k, float, .. } = args;
    let out = |quantization| Output::Codes {
        codes: args.codes,
        stride: args.codes_stride,
        quantization,
    };
    let rows = Quantize {
        m,
        k,
        x: args.x,
        float,
        row_stride: args.row_stride,
        codes: args.codes,
        codes_stride: args.codes_stride,
        quantization: Quantization::Token { scales: args.scale },
        dependent: args.dependent,
    };
    if m <= 1 {
        // SAFETY: the caller's promise.
        return unsafe { launch(stream, &rows, out(rows.quantization), None) };
    }
    check(&rows);
    let aligned = rows_are_aligned(args.x, args.row_stride * float.size(), 16);
    // No more blocks than there is work for.
    let work = (m * k).div_ceil(8 * AMAX_THREADS as usize);
    let blocks = work.min(m).min(MOST_PARTIAL) as u32;
    let amax = Launch {
        grid: [blocks, 1, 1],
        threads: AMAX_THREADS,
        shared: 0,
        cluster: 1,
        dependent: args.dependent,
    };
    let kernel = Module::Quantize.kernel(match float {
        Float::Bf16 => "quantize_bf16_amax",
        Float::F16 => "quantize_f16_amax",
        Float::F32 => "quantize_f32_amax",
    })?;
    let (stride, rows_u32, k_u32) = (args.row_stride as u64, size(m), size(k));
    let aligned = u32::from(aligned);
    let params = args![&args.x, &stride, &rows_u32, &k_u32, &aligned, &args.scratch];
    // SAFETY: the kernel takes these arguments; the caller vouches for the memory.
    unsafe { amax.run(stream, kernel, params) }?;
    // Any scale will do: the kernel computes it.
    let fixed = out(Quantization::Static { scale: 1.0 });
    // SAFETY: as above.
    unsafe { launch(stream, &rows, fixed, Some((args.scratch, blocks))) }
}

fn check(args: &Quantize) {
    assert!(args.k > 0, "rows are not empty");
    assert!(args.row_stride >= args.k, "rows fit their stride");
}

/// With `magnitudes`, the scale is for the largest of so many, and goes where that of a row would.
///
/// # Safety
/// As [`quantize`].
unsafe fn launch(
    stream: &CudaStream,
    args: &Quantize,
    out: Output,
    magnitudes: Option<(Address, u32)>,
) -> Result<(), Error> {
    check(args);
    let &Quantize { m, k, float, .. } = args;
    let aligned = rows_are_aligned(args.x, args.row_stride * float.size(), 16);
    let aligned = aligned && out.is_aligned(float);
    let choice = Choice::new(Gpu::of(stream)?, (m, k), aligned, out.reduces(), 1);
    let mut params = out.params((m, k), choice.shape);
    let (magnitudes, count) = magnitudes.unwrap_or((0, 0));
    if count > 0 {
        params.mode = Mode::Tensor;
        if let Quantization::Token { scales } = args.quantization {
            params.scales = scales;
        }
    }
    let input = Input {
        x: args.x,
        magnitudes,
        stride: args.row_stride as u64,
        count,
    };
    let kernel = Module::Quantize.kernel(kernel_name!("quantize", float, choice.variant))?;
    let launch = choice.launch(args.dependent);
    // SAFETY: the kernel takes these arguments; the caller vouches for the memory.
    unsafe { launch.run(stream, kernel, args![&input, &params]) }
}
