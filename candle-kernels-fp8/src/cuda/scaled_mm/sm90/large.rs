//! Many rows of activations: a product that is bound by arithmetic.

use cudarc::driver::CudaStream;

use super::{ALIGNED, DEPTH, in_tiles, weight_map, x_map};
use crate::cuda::Gpu;
use crate::cuda::error::Error;
use crate::cuda::launch::{Launch, args};
use crate::cuda::library::Module;
use crate::cuda::scaled_mm::params::Params;
use crate::cuda::scaled_mm::{Accumulation, ScaledMm, row_wise};

/// A block's tile of a product with many rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Sm90Large {
    /// Tokens: 128 or 256.
    pub(in crate::cuda::scaled_mm) tokens: u32,
    /// Output features: 64, 96, 128 or 192.
    pub(in crate::cuda::scaled_mm) features: u32,
}

/// Blocks that share activations, as device code says.
const PAIR: u32 = 2;

impl Sm90Large {
    pub(in crate::cuda::scaled_mm) fn all() -> Vec<Self> {
        [(256, 128), (128, 192), (128, 128), (128, 96), (128, 64)]
            .map(|(tokens, features)| Self { tokens, features })
            .into()
    }

    pub(in crate::cuda::scaled_mm) fn serves(self, args: &ScaledMm) -> bool {
        in_tiles(args)
    }

    /// Stages of the ring of tiles, as device code says.
    fn stages(self) -> u32 {
        match self.tokens + self.features {
            289.. => 4,
            257.. => 5,
            193.. => 6,
            _ => 8,
        }
    }

    /// Bytes of shared memory, as device code lays it out, and what aligning it may cost.
    fn shared(self) -> u32 {
        let ring = self.stages() * (self.tokens + self.features) * DEPTH as u32;
        let results = 8 * 16 * (self.features / 2 + 8) * 2;
        // A tile whose features are no part of 128 meets blocks of 128 in three runs.
        let runs = if 128 % self.features == 0 { 1 } else { 3 };
        let part_scales = self.stages() * runs * self.tokens * 4;
        let scales = (4 * self.features + self.tokens) * 4;
        (ring + results + part_scales + scales + self.stages() * 16).next_multiple_of(ALIGNED)
            + ALIGNED
    }

    fn kernel(self, args: &ScaledMm) -> &'static str {
        let tile = (self.tokens, self.features);
        match (tile, row_wise(args), args.accumulation) {
            ((256, 128), false, _) => "scaled_mm_sm90_large_256x128_block",
            ((128, 192), false, _) => "scaled_mm_sm90_large_128x192_block",
            ((128, 128), false, _) => "scaled_mm_sm90_large_128x128_block",
            ((128, 96), false, _) => "scaled_mm_sm90_large_128x96_block",
            (_, false, _) => "scaled_mm_sm90_large_128x64_block",
            ((256, 128), true, Accumulation::Fast) => "scaled_mm_sm90_large_256x128_fast",
            ((128, 192), true, Accumulation::Fast) => "scaled_mm_sm90_large_128x192_fast",
            ((128, 128), true, Accumulation::Fast) => "scaled_mm_sm90_large_128x128_fast",
            ((256, 128), ..) => "scaled_mm_sm90_large_256x128",
            ((128, 192), ..) => "scaled_mm_sm90_large_128x192",
            ((128, 128), ..) => "scaled_mm_sm90_large_128x128",
            ((128, 96), ..) => "scaled_mm_sm90_large_128x96",
            _ => "scaled_mm_sm90_large_128x64",
        }
    }
}

/// # Safety
/// As [`crate::cuda::scaled_mm`]; the device is of compute capability 9.0.
pub(in crate::cuda::scaled_mm) unsafe fn launch(
    stream: &CudaStream,
    gpu: Gpu,
    args: &ScaledMm,
    config: Sm90Large,
) -> Result<(), Error> {
    let params = Params::new(args);
    // Each of a pair copies its part of the activations that both use.
    let x = x_map(args, config.tokens / PAIR)?;
    let weight = weight_map(args, config.features, 1)?;
    let kernel = Module::Sm90ScaledMmLarge.kernel(config.kernel(args))?;
    let pairs = params.m.div_ceil(config.tokens) * params.n.div_ceil(PAIR * config.features);
    let launch = Launch {
        grid: [PAIR * pairs.min(gpu.processors / PAIR), 1, 1],
        threads: 384,
        shared: config.shared(),
        cluster: PAIR,
        dependent: args.dependent,
    };
    // SAFETY: the kernel takes these arguments; the caller vouches for the memory.
    unsafe { launch.run(stream, kernel, args![&params, &x, &weight]) }
}
