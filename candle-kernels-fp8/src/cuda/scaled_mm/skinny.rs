//! Few rows of activations: a product that is bound by reading the weight.

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
    /// Output features of a block: 8, 16 or 32.
    pub(super) rows: u32,
    /// Warps of a block, among which K is shared out: at most 16.
    pub(super) warps: u32,
}

/// Most rows of activations.
pub(super) const MOST: usize = 16;

impl Skinny {
    pub(super) fn all() -> Vec<Self> {
        let warps = [4, 8, 16];
        let with = |rows| warps.map(|warps| Self { rows, warps });
        [8, 16, 32].into_iter().flat_map(with).collect()
    }

    pub(super) fn serves(self, args: &ScaledMm) -> bool {
        let values =
            matches!(args.activations, Activations::Values { float, .. } if float == Float::F32);
        args.m <= MOST
            && args.k.is_multiple_of(16)
            && !values
            && in_parts(args)
            && (self.tiles(args), self.rows) != (2, 8)
            && (self.tiles(args), self.rows) != (1, 32)
    }

    /// Eights of tokens.
    fn tiles(self, args: &ScaledMm) -> u32 {
        if args.m <= 8 { 1 } else { 2 }
    }

    fn kernel(self, args: &ScaledMm) -> &'static str {
        macro_rules! names {
            ($name:literal) => {
                match (self.rows, self.tiles(args), row_wise(args)) {
                    (8, _, true) => concat!("scaled_mm_skinny_", $name, "_8x1"),
                    (8, _, false) => concat!("scaled_mm_skinny_", $name, "_8x1_block"),
                    (16, 1, true) => concat!("scaled_mm_skinny_", $name, "_16x1"),
                    (16, 1, false) => concat!("scaled_mm_skinny_", $name, "_16x1_block"),
                    (16, _, true) => concat!("scaled_mm_skinny_", $name, "_16x2"),
                    (16, _, false) => concat!("scaled_mm_skinny_", $name, "_16x2_block"),
                    (_, _, true) => concat!("scaled_mm_skinny_", $name, "_32x2"),
                    (_, _, false) => concat!("scaled_mm_skinny_", $name, "_32x2_block"),
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
        threads: config.warps * 32,
        // Sums of each warp: [tokens][features].
        shared: config.warps * config.tiles(args) * 8 * config.rows * 4,
        cluster: 1,
        dependent: args.dependent,
    };
    // SAFETY: the kernel takes these arguments; the caller vouches for the memory.
    unsafe { launch.run(stream, kernel, args![&params]) }
}
