//! Some rows of activations that are not quantized: neither the weight's bytes nor arithmetic is all.

use cudarc::driver::CudaStream;

use super::{ALIGNED, DEPTH, in_values, values_maps};
use crate::cuda::Float;
use crate::cuda::error::Error;
use crate::cuda::launch::{Launch, args};
use crate::cuda::library::Module;
use crate::cuda::scaled_mm::params::Params;
use crate::cuda::scaled_mm::{Activations, ScaledMm, row_wise};

/// A block's tile of a product of values with some rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Sm90ValuesSmall {
    /// Tokens of a block: 32, 64 or 128.
    pub(in crate::cuda::scaled_mm) tokens: u32,
    /// Blocks that share out K: at most 8.
    pub(in crate::cuda::scaled_mm) blocks: u32,
}

impl Sm90ValuesSmall {
    /// Output features of a block.
    const FEATURES: u32 = 128;

    pub(in crate::cuda::scaled_mm) fn all() -> Vec<Self> {
        let with = |tokens| [1, 2, 3, 4, 6, 8].map(|blocks| Self { tokens, blocks });
        [32, 64, 128].into_iter().flat_map(with).collect()
    }

    pub(in crate::cuda::scaled_mm) fn serves(self, args: &ScaledMm) -> bool {
        in_values(args)
            && self.blocks as usize <= args.k.div_ceil(DEPTH)
            && self.kernel(args).is_some()
    }

    /// Stages of the rings of weights and of activations, as device code says.
    fn stages(self) -> (u32, u32) {
        match self.tokens {
            32 => (5, 7),
            64 => (4, 5),
            _ => (6, 7),
        }
    }

    /// Bytes of shared memory, as device code lays it out, and what aligning it may cost.
    fn shared(self) -> u32 {
        let (weights, xs) = self.stages();
        let ring = (weights * Self::FEATURES + xs * self.tokens) * DEPTH as u32;
        let sums = self.tokens * (Self::FEATURES + 4) * 4;
        (ring.max(sums) + (weights + xs) * 16).next_multiple_of(ALIGNED) + ALIGNED
    }

    fn kernel(self, args: &ScaledMm) -> Option<&'static str> {
        let Activations::Values { float, .. } = args.activations else {
            return None;
        };
        Some(match (float, self.tokens, row_wise(args)) {
            (Float::Bf16, 32, true) => "scaled_mm_sm90_values_small_bf16_32",
            (Float::Bf16, 64, true) => "scaled_mm_sm90_values_small_bf16_64",
            (Float::Bf16, 128, true) => "scaled_mm_sm90_values_small_bf16_128",
            (Float::Bf16, 32, false) => "scaled_mm_sm90_values_small_bf16_32_block",
            (Float::Bf16, 64, false) => "scaled_mm_sm90_values_small_bf16_64_block",
            (Float::F16, 32, true) => "scaled_mm_sm90_values_small_f16_32",
            (Float::F16, 64, true) => "scaled_mm_sm90_values_small_f16_64",
            (Float::F16, 128, true) => "scaled_mm_sm90_values_small_f16_128",
            (Float::F16, 32, false) => "scaled_mm_sm90_values_small_f16_32_block",
            (Float::F16, 64, false) => "scaled_mm_sm90_values_small_f16_64_block",
            _ => return None,
        })
    }
}

/// # Safety
/// As [`crate::cuda::scaled_mm`]; the device is of compute capability 9.0.
pub(in crate::cuda::scaled_mm) unsafe fn launch(
    stream: &CudaStream,
    args: &ScaledMm,
    config: Sm90ValuesSmall,
) -> Result<(), Error> {
    let params = Params::new(args);
    let features = Sm90ValuesSmall::FEATURES;
    let [x, weight] = values_maps(args, config.tokens, features)?;
    let name = config
        .kernel(args)
        .expect("the kernel serves the arguments");
    let kernel = Module::Sm90ScaledMmValuesSmall.kernel(name)?;
    let tiles = params.n.div_ceil(features) * params.m.div_ceil(config.tokens);
    let launch = Launch {
        grid: [tiles * config.blocks, 1, 1],
        threads: 320,
        shared: config.shared(),
        cluster: config.blocks,
        dependent: args.dependent,
    };
    // SAFETY: the kernel takes these arguments; the caller vouches for the memory.
    unsafe { launch.run(stream, kernel, args![&params, &x, &weight, &config.blocks]) }
}

#[cfg(test)]
mod tests {
    use super::super::SHARED;
    use super::*;

    /// Shared memory of a multiprocessor, of which each block takes 1 KiB more than it asks for.
    const OF_PROCESSOR: u32 = 228 * 1024;

    #[test]
    fn two_blocks_of_few_tokens_fit_a_multiprocessor() {
        for tile in Sm90ValuesSmall::all() {
            let most = match tile.tokens {
                128 => SHARED,
                _ => OF_PROCESSOR / 2 - 1024,
            };
            assert!(tile.shared() <= most, "{tile:?}: {}", tile.shared());
        }
    }
}
