//! Rows of activations in between: a product for which neither the weight's bytes nor arithmetic is all.

use cudarc::driver::CudaStream;

use super::{ALIGNED, DEPTH, in_tiles, weight_map, x_map};
use crate::cuda::error::Error;
use crate::cuda::launch::{Launch, args};
use crate::cuda::library::Module;
use crate::cuda::scaled_mm::params::Params;
use crate::cuda::scaled_mm::{ScaledMm, row_wise};

/// A block's tile of a product with some rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Sm90Small {
    /// Tokens of a block: 32, 64 or 128.
    pub(in crate::cuda::scaled_mm) tokens: u32,
    /// Blocks that share out K: at most 8.
    pub(in crate::cuda::scaled_mm) blocks: u32,
}

impl Sm90Small {
    /// Output features of a block.
    pub(in crate::cuda::scaled_mm) const FEATURES: u32 = 128;

    pub(in crate::cuda::scaled_mm) fn all() -> Vec<Self> {
        let with = |tokens| [1, 2, 3, 4, 6, 8].map(|blocks| Self { tokens, blocks });
        [32, 64, 128].into_iter().flat_map(with).collect()
    }

    pub(in crate::cuda::scaled_mm) fn serves(self, args: &ScaledMm) -> bool {
        in_tiles(args) && self.blocks as usize <= args.k.div_ceil(DEPTH)
    }

    /// Stages of the ring of tiles, as device code says.
    fn stages(self) -> u32 {
        match self.tokens {
            32 => 5,
            64 => 4,
            _ => 6,
        }
    }

    /// Bytes of shared memory, as device code lays it out, and what aligning it may cost.
    fn shared(self) -> u32 {
        let ring = self.stages() * (Self::FEATURES + self.tokens) * DEPTH as u32;
        let sums = self.tokens * (Self::FEATURES + 4) * 4;
        let scales = (self.stages() + 1) * self.tokens * 4;
        (ring.max(sums) + scales + self.stages() * 16).next_multiple_of(ALIGNED) + ALIGNED
    }

    fn kernel(self, args: &ScaledMm) -> &'static str {
        match (self.tokens, row_wise(args)) {
            (32, true) => "scaled_mm_sm90_small_32",
            (32, false) => "scaled_mm_sm90_small_32_block",
            (64, true) => "scaled_mm_sm90_small_64",
            (64, false) => "scaled_mm_sm90_small_64_block",
            (_, true) => "scaled_mm_sm90_small_128",
            (_, false) => "scaled_mm_sm90_small_128_block",
        }
    }
}

/// # Safety
/// As [`crate::cuda::scaled_mm`]; the device is of compute capability 9.0.
pub(in crate::cuda::scaled_mm) unsafe fn launch(
    stream: &CudaStream,
    args: &ScaledMm,
    config: Sm90Small,
) -> Result<(), Error> {
    let params = Params::new(args);
    let (x, weight) = (
        x_map(args, config.tokens)?,
        weight_map(args, Sm90Small::FEATURES, 1)?,
    );
    let kernel = Module::Sm90ScaledMmSmall.kernel(config.kernel(args))?;
    let tiles = params.n.div_ceil(Sm90Small::FEATURES) * params.m.div_ceil(config.tokens);
    let launch = Launch {
        grid: [tiles * config.blocks, 1, 1],
        // Scales that change along K have a warp of their own.
        threads: if row_wise(args) { 288 } else { 320 },
        shared: config.shared(),
        cluster: config.blocks,
        dependent: args.dependent,
    };
    let dependent = u32::from(args.dependent);
    // SAFETY: the kernel takes these arguments; the caller vouches for the memory.
    unsafe {
        launch.run(
            stream,
            kernel,
            args![&params, &x, &weight, &config.blocks, &dependent],
        )
    }
}
