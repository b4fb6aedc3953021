//! Products of activations, quantized or not, with E4M3 weights.

mod any;
mod choose;
mod mma;
mod params;
mod skinny;
mod sm90;

use cudarc::driver::CudaStream;

use super::error::Error;
use super::{Address, Float, Gpu};
use crate::ScaleLayout;
pub use crate::cpu::Scaling;
pub use choose::Kernel;

/// The activations of a [`ScaledMm`].
#[derive(Debug, Clone, Copy)]
pub enum Activations {
    /// As they are, `[m, k]`.
    Values {
        /// Of the first value, a multiple of 16.
        values: Address,
        /// Their type.
        float: Float,
    },
    /// Quantized.
    Codes {
        /// E4M3, `[m, k]`; a multiple of 16.
        codes: Address,
        /// F32, of the shape that `scaling` says.
        scales: Address,
        /// Which activations share a scale.
        scaling: Scaling,
    },
}

/// How products of codes are added up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Accumulation {
    /// In the tensor cores over at most 128 products, whose sums are added in f32.
    #[default]
    Promoted,
    /// In the tensor cores alone, which keep 13 to 14 bits of a sum of FP8 products on Hopper: faster, and less exact the
    /// longer K is. Where a kernel has no such way, as `Promoted`.
    Fast,
}

/// Where the codes of a weight `[n, k]` are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WeightLayout {
    /// Row-major.
    Rows {
        /// Bytes from one row to the next, a multiple of 16.
        stride: usize,
    },
    /// As [`Panels`](super::Panels) says: faster to read.
    Panels,
}

/// A product of activations `[m, k]` with the transpose of a weight `[n, k]`.
#[derive(Debug, Clone, Copy)]
pub struct ScaledMm {
    /// Rows of activations.
    pub m: usize,
    /// Output features.
    pub n: usize,
    /// Input features.
    pub k: usize,
    /// `[m, k]`.
    pub activations: Activations,
    /// Elements from one row of activations to the next; rows start at multiples of 16 bytes. What is between them is
    /// not used.
    pub row_stride: usize,
    /// E4M3 `[n, k]`, a multiple of 16.
    pub weight: Address,
    /// Where its codes are.
    pub weight_layout: WeightLayout,
    /// F32, as `layout` says.
    pub weight_scales: Address,
    /// Layout of `weight_scales`.
    pub layout: ScaleLayout,
    /// `[n]`, with its type.
    pub bias: Option<(Address, Float)>,
    /// Receives `[m, n]`, dense; a multiple of 16.
    pub out: Address,
    /// Type of `out`.
    pub out_float: Float,
    /// How products of codes are added up.
    pub accumulation: Accumulation,
    /// Whether the launch may overlap the kernel before it: see [dependent launches](super#dependent-launches).
    pub dependent: bool,
}

/// Computes a product with the kernel that should be the fastest on the stream's device.
///
/// # Errors
/// If the device has no FP8 units or the driver refuses the launch.
///
/// # Panics
/// If sizes, strides or addresses are not as [`ScaledMm`] says.
///
/// # Safety
/// The addresses are of memory of the stream's device, as large as the sizes say, valid until the stream has passed the
/// launch; `out` overlaps nothing that is read; and what [dependent launches](super#dependent-launches) ask for holds.
pub unsafe fn scaled_mm(stream: &CudaStream, args: &ScaledMm) -> Result<(), Error> {
    let gpu = Gpu::of(stream)?;
    // SAFETY: the caller's promise.
    unsafe { scaled_mm_with(stream, args, Kernel::chosen(gpu, args)) }
}

/// As [`scaled_mm`], with a kernel that is given.
///
/// # Errors
/// As [`scaled_mm`].
///
/// # Panics
/// As [`scaled_mm`], and if the kernel does not [serve](Kernel::serves) the arguments.
///
/// # Safety
/// As [`scaled_mm`].
pub unsafe fn scaled_mm_with(
    stream: &CudaStream,
    args: &ScaledMm,
    kernel: Kernel,
) -> Result<(), Error> {
    check(args);
    let gpu = Gpu::of(stream)?;
    assert!(kernel.serves(gpu, args), "{kernel} does not serve {args:?}");
    if args.m == 0 || args.n == 0 {
        return Ok(());
    }
    // SAFETY: the caller's promise, and the kernel serves the arguments.
    unsafe {
        match kernel {
            Kernel::Any(config) => any::launch(stream, args, config),
            Kernel::Mma(config) => mma::launch(stream, args, config),
            Kernel::Skinny(config) => skinny::launch(stream, args, config),
            Kernel::Sm90Skinny(config) => sm90::launch_skinny(stream, gpu, args, config),
            Kernel::Sm90Small(config) => sm90::launch_small(stream, args, config),
            Kernel::Sm90Large(config) => sm90::launch_large(stream, gpu, args, config),
            Kernel::Sm90Values(config) => sm90::launch_values(stream, gpu, args, config),
            Kernel::Sm90ValuesSmall(config) => sm90::launch_values_small(stream, args, config),
        }
    }
}

fn check(args: &ScaledMm) {
    let (x, size) = match args.activations {
        Activations::Values { values, float } => (values, float.size()),
        Activations::Codes { codes, .. } => (codes, 1),
    };
    assert!(args.k > 0, "rows are not empty");
    for address in [x, args.weight, args.out] {
        assert_eq!(address % 16, 0, "matrices start at multiples of 16 bytes");
    }
    assert!(
        args.row_stride >= args.k && (args.row_stride * size).is_multiple_of(16),
        "rows of activations start at multiples of 16 bytes"
    );
    if let WeightLayout::Rows { stride } = args.weight_layout {
        assert!(
            stride >= args.k && stride.is_multiple_of(16),
            "rows of the weight start at multiples of 16 bytes"
        );
    }
}

/// Whether the scales of activations and weight are constant along K.
fn row_wise(args: &ScaledMm) -> bool {
    let of_rows = |activations| !matches!(activations, Activations::Codes { scaling: Scaling::Group(group), .. } if group < args.k);
    of_rows(args.activations) && args.layout.run(args.k) >= args.k
}

/// Whether scales change along K at multiples of 128 only.
fn in_parts(args: &ScaledMm) -> bool {
    let whole = |run: usize| run >= args.k || run.is_multiple_of(128);
    let group = match args.activations {
        Activations::Codes {
            scaling: Scaling::Group(group),
            ..
        } => group,
        _ => args.k,
    };
    whole(group) && whole(args.layout.run(args.k))
}
