//! Few rows of activations, on every card: a product that is bound by reading the weight.

use cudarc::driver::CudaStream;

use super::params::Params;
use super::{Activations, ScaledMm, in_parts, row_wise};
use crate::cuda::Float;
use crate::cuda::error::Error;
use crate::cuda::launch::{Launch, args};
use crate::cuda::library::Module;

/// How a product with few rows of activations is shared out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Skinny {
    /// Output features of a block: 8 or 16.
    pub(super) rows: u32,
}

/// Most rows of activations.
const MOST: usize = 16;

/// Chunks of K that a warp has under way, as device code says.
const DEPTH: u32 = 2;

impl Skinny {
    pub(super) fn all() -> Vec<Self> {
        [8, 16].map(|rows| Self { rows }).into()
    }

    /// Enough blocks for every multiprocessor, of as many rows as that allows.
    pub(super) fn chosen(gpu: crate::cuda::Gpu, args: &ScaledMm) -> Self {
        let narrow = args.m <= 8 && args.n.div_ceil(16) < gpu.processors as usize;
        Self {
            rows: if narrow { 8 } else { 16 },
        }
    }

    pub(super) fn serves(self, args: &ScaledMm) -> bool {
        let wide =
            matches!(args.activations, Activations::Values { float, .. } if float == Float::F32);
        args.m <= MOST
            && args.k.is_multiple_of(16)
            && !wide
            && in_parts(args)
            && (self.rows == 16 || Self::tiles(args) == 1)
    }

    /// Eights of tokens.
    fn tiles(args: &ScaledMm) -> u32 {
        if args.m <= 8 { 1 } else { 2 }
    }

    /// Warps of a block, among which K is shared out.
    fn warps(self) -> u32 {
        128 / self.rows
    }

    fn kernel(self, args: &ScaledMm) -> &'static str {
        macro_rules! names {
            ($name:literal) => {
                match (self.rows, Self::tiles(args), row_wise(args)) {
                    (8, _, true) => concat!("scaled_mm_skinny_", $name, "_8x1"),
                    (8, _, false) => concat!("scaled_mm_skinny_", $name, "_8x1_block"),
                    (_, 1, true) => concat!("scaled_mm_skinny_", $name, "_16x1"),
                    (_, 1, false) => concat!("scaled_mm_skinny_", $name, "_16x1_block"),
                    (_, _, true) => concat!("scaled_mm_skinny_", $name, "_16x2"),
                    (_, _, false) => concat!("scaled_mm_skinny_", $name, "_16x2_block"),
                }
            };
        }
        match args.activations {
            Activations::Codes { .. } => names!("e4m3"),
            Activations::Values {
                float: Float::Bf16, ..
            } => names!("bf16"),
            Activations::Values { .. } => names!("f16"),
        }
    }
}

/// # Safety
/// As [`super::scaled_mm`].
pub(super) unsafe fn launch(
    stream: &CudaStream,
    args: &ScaledMm,
    config: Skinny,
) -> Result<(), Error> {
    let params = Params::new(args);
    let kernel = Module::ScaledMmSkinny.kernel(config.kernel(args))?;
    let launch = Launch {
        grid: [params.n.div_ceil(config.rows), 1, 1],
        threads: config.warps() * 32,
        // A ring for each warp, in chunks of 128 codes.
        shared: config.warps() * DEPTH * config.rows * 128,
        cluster: 1,
        dependent: args.dependent,
    };
    // SAFETY: the kernel takes these arguments; the caller vouches for the memory.
    unsafe { launch.run(stream, kernel, args![&params]) }
}
