//! Products of activations, quantized or not, with E4M3 weights.
//!
//! Floor: for few rows the reading of the weight, a byte for each; for many the 2 · m · n · k operations of the matrix
//! units.

use std::fmt;

use super::dequantize::scale_rows;
use super::launch::{copies, word};
use super::{Binding, Float, LANES, Launch, Library, Queue, Slice};
use crate::ScaleLayout;
pub use crate::cpu::Scaling;

/// The activations of a [`ScaledMm`].
#[derive(Debug)]
pub enum Activations<'a, B> {
    /// As they are, `[m, k]`.
    Values {
        /// The values.
        values: Slice<'a, B>,
        /// Their type.
        float: Float,
    },
    /// Quantized.
    Codes {
        /// E4M3, `[m, k]`.
        codes: Slice<'a, B>,
        /// F32, of the shape that `scaling` says.
        scales: Slice<'a, B>,
        /// Which activations share a scale.
        scaling: Scaling,
    },
}

copies!(Activations);

/// A product of activations `[m, k]` with the transpose of a weight `[n, k]`. Rows that start at multiples of 16 bytes
/// are read faster than others.
#[derive(Debug)]
pub struct ScaledMm<'a, B> {
    /// Rows of activations.
    pub m: usize,
    /// Output features.
    pub n: usize,
    /// Input features.
    pub k: usize,
    /// `[m, k]`.
    pub activations: Activations<'a, B>,
    /// Elements from one row of activations to the next.
    pub row_stride: usize,
    /// E4M3 `[n, k]`.
    pub weight: Slice<'a, B>,
    /// Bytes from one row of the weight to the next.
    pub weight_stride: usize,
    /// F32, as `layout` says.
    pub weight_scales: Slice<'a, B>,
    /// Layout of `weight_scales`.
    pub layout: ScaleLayout,
    /// `[n]`, with its type.
    pub bias: Option<(Slice<'a, B>, Float)>,
    /// Receives `[m, n]`, dense; overlaps nothing that is read.
    pub out: Slice<'a, B>,
    /// Type of `out`.
    pub out_float: Float,
}

/// A kernel for products.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kernel {
    /// For as many rows of activations at most: a SIMD group computes a few results of each.
    Gemv {
        /// 1, 2, 4 or 8.
        tokens: usize,
    },
    /// On the matrix units, in tiles of as many rows and 64 features.
    Tile {
        /// 16 or 64.
        tokens: usize,
    },
}

/// SIMD groups of a group in `Gemv`.
const GEMV_SIMDS: usize = 4;
/// As device code says.
const TILE_THREADS: usize = 128;
const TILE_FEATURES: usize = 64;

impl Kernel {
    /// All there are.
    pub const ALL: [Self; 6] = [
        Self::Gemv { tokens: 1 },
        Self::Gemv { tokens: 2 },
        Self::Gemv { tokens: 4 },
        Self::Gemv { tokens: 8 },
        Self::Tile { tokens: 16 },
        Self::Tile { tokens: 64 },
    ];

    /// For so many rows of activations.
    pub fn chosen(m: usize) -> Self {
        match m {
            0..=8 => Self::Gemv {
                tokens: m.max(1).next_power_of_two(),
            },
            9..=16 => Self::Tile { tokens: 16 },
            _ => Self::Tile { tokens: 64 },
        }
    }

    /// Whether it can compute so many rows.
    pub fn serves(self, m: usize) -> bool {
        match self {
            Self::Gemv { tokens } => m <= tokens,
            Self::Tile { .. } => true,
        }
    }

    /// Results of each row that a SIMD group computes in `Gemv`, as device code says.
    fn features(tokens: usize) -> usize {
        if tokens <= 2 { 4 } else { 2 }
    }

    fn name<B>(self, args: &ScaledMm<'_, B>) -> &'static str {
        macro_rules! names {
            ($name:literal) => {
                match (self, row_wise(args)) {
                    (Self::Gemv { tokens: 1 }, true) => concat!("scaled_mm_gemv_", $name, "_1"),
                    (Self::Gemv { tokens: 2 }, true) => concat!("scaled_mm_gemv_", $name, "_2"),
                    (Self::Gemv { tokens: 4 }, true) => concat!("scaled_mm_gemv_", $name, "_4"),
                    (Self::Gemv { .. }, true) => concat!("scaled_mm_gemv_", $name, "_8"),
                    (Self::Gemv { tokens: 1 }, _) => concat!("scaled_mm_gemv_block_", $name, "_1"),
                    (Self::Gemv { tokens: 2 }, _) => concat!("scaled_mm_gemv_block_", $name, "_2"),
                    (Self::Gemv { tokens: 4 }, _) => concat!("scaled_mm_gemv_block_", $name, "_4"),
                    (Self::Gemv { .. }, _) => concat!("scaled_mm_gemv_block_", $name, "_8"),
                    (Self::Tile { tokens: 16 }, _) => concat!("scaled_mm_tile_", $name, "_16"),
                    (Self::Tile { .. }, _) => concat!("scaled_mm_tile_", $name, "_64"),
                }
            };
        }
        match args.activations {
            Activations::Codes { .. } => names!("e4m3"),
            Activations::Values { float, .. } => match float {
                Float::Bf16 => names!("bf16"),
                Float::F16 => names!("f16"),
                Float::F32 => names!("f32"),
            },
        }
    }
}

/// Whether the scales of activations and weight are constant along K.
fn row_wise<B>(args: &ScaledMm<'_, B>) -> bool {
    let of_rows = match args.activations {
        Activations::Codes {
            scaling: Scaling::Group(group),
            ..
        } => group >= args.k,
        _ => true,
    };
    of_rows && args.layout.run(args.k) >= args.k
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gemv { tokens } => write!(f, "gemv {tokens}"),
            Self::Tile { tokens } => write!(f, "tile {tokens}"),
        }
    }
}

/// Computes a product with the kernel that should be the fastest.
///
/// # Errors
/// If the queue refuses the launch.
///
/// # Panics
/// If `k` is 0, a stride is below `k`, or sizes do not fit 32 bits.
pub fn scaled_mm<Q: Queue>(queue: &Q, args: &ScaledMm<'_, Q::Buffer>) -> Result<(), Q::Error> {
    scaled_mm_with(queue, args, Kernel::chosen(args.m))
}

/// As [`scaled_mm`], with a kernel that is given.
///
/// # Errors
/// As [`scaled_mm`].
///
/// # Panics
/// As [`scaled_mm`], and if the kernel does not [serve](Kernel::serves) so many rows.
pub fn scaled_mm_with<Q: Queue>(
    queue: &Q,
    args: &ScaledMm<'_, Q::Buffer>,
    kernel: Kernel,
) -> Result<(), Q::Error> {
    assert!(args.k > 0, "rows are not empty");
    assert!(
        args.row_stride >= args.k && args.weight_stride >= args.k,
        "rows fit their strides"
    );
    assert!(
        kernel.serves(args.m),
        "{kernel} does not serve {} rows",
        args.m
    );
    if args.m == 0 || args.n == 0 {
        return Ok(());
    }
    let (x, x_scales) = match args.activations {
        Activations::Values { values, .. } => (values, None),
        Activations::Codes { codes, scales, .. } => (codes, Some(scales)),
    };
    // The weight's scales stand in for what is not read.
    let x_scales = x_scales.unwrap_or(args.weight_scales);
    let bias = args.bias.map_or(args.weight_scales, |(bias, _)| bias);
    let (library, groups, threads) = match kernel {
        Kernel::Gemv { tokens } => (
            Library::ScaledMmGemv,
            args.n.div_ceil(Kernel::features(tokens) * GEMV_SIMDS),
            GEMV_SIMDS * LANES,
        ),
        Kernel::Tile { tokens } => (
            Library::ScaledMmTile,
            args.m.div_ceil(tokens) * args.n.div_ceil(TILE_FEATURES),
            TILE_THREADS,
        ),
    };
    queue.launch(&Launch {
        library,
        kernel: kernel.name(args),
        words: &words(args),
        buffers: &[
            Binding::Read(x),
            Binding::Read(x_scales),
            Binding::Read(args.weight),
            Binding::Read(args.weight_scales),
            Binding::Read(bias),
            Binding::Write(args.out),
        ],
        groups,
        threads,
    })
}

/// Device twin: `ScaledMm` in `kernels/scaled_mm.h`, which says what they mean.
fn words<B>(args: &ScaledMm<'_, B>) -> [u32; 15] {
    let &ScaledMm { m, n, k, .. } = args;
    let (x, size, x_scale_row, x_scale_run, has_x_scales) = match args.activations {
        Activations::Values { values, float } => (values, float.size(), 0, k, 0),
        Activations::Codes { codes, scaling, .. } => {
            let (row, run) = match scaling {
                Scaling::Tensor => (0, k),
                Scaling::Token => (1, k),
                Scaling::Group(group) => (k.div_ceil(group), group.min(k)),
            };
            (codes, 1, row, run, 1)
        }
    };
    let [weight_scale_rows, weight_scale_row] = scale_rows(args.layout, n, k);
    let starts = x.offset | (args.row_stride * size) | args.weight.offset | args.weight_stride;
    let bias_float = args.bias.map_or(Float::F32, |(_, float)| float);
    // The largest index of a scale fits, too.
    word(m * x_scale_row);
    [
        word(m),
        word(n),
        word(k),
        word(args.row_stride),
        word(args.weight_stride),
        word(x_scale_row),
        word(x_scale_run),
        weight_scale_rows,
        weight_scale_row,
        word(args.layout.run(k).min(k)),
        has_x_scales,
        u32::from(args.bias.is_some()),
        bias_float as u32,
        args.out_float as u32,
        u32::from(starts.is_multiple_of(16)),
    ]
}
