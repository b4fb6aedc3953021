//! Many rows of activations that are not quantized: a product that is bound by arithmetic.

use cudarc::driver::CudaStream;

use super::{ALIGNED, DEPTH, in_values, values_maps};
use crate::cuda::error::Error;
use crate::cuda::launch::{Launch, args};
use crate::cuda::library::Module;
use crate::cuda::scaled_mm::params::Params;
use crate::cuda::scaled_mm::{Activations, ScaledMm, row_wise};
use crate::cuda::{Float, Gpu};

/// A block's tile of a product of values with many rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Sm90Values {
    /// Tokens: 64, 128 or 256.
    pub(in crate::cuda::scaled_mm) tokens: u32,
    /// Output features: 128 or 192.
    pub(in crate::cuda::scaled_mm) features: u32,
}

/// Blocks that share activations, as device code says.
const PAIR: u32 = 2;

impl Sm90Values {
    pub(in crate::cuda::scaled_mm) fn all() -> Vec<Self> {
        [(256, 128), (128, 192), (128, 128), (64, 192)]
            .map(|(tokens, features)| Self { tokens, features })
            .into()
    }

    pub(in crate::cuda::scaled_mm) fn serves(self, args: &ScaledMm) -> bool {
        in_values(args) && self.kernel(args).is_some()
    }

    /// Stages of the rings of weights and of activations, as device code says.
    fn stages(self) -> (u32, u32) {
        match (self.tokens, self.features) {
            (256, _) => (3, 5),
            (64, _) => (5, 8),
            (_, 192) => (4, 6),
            _ => (4, 8),
        }
    }

    /// Bytes of shared memory, as device code lays it out, and what aligning it may cost.
    fn shared(self) -> u32 {
        let (weights, xs) = self.stages();
        let ring = (weights * self.features + xs * self.tokens) * DEPTH as u32;
        let results = self.features * 64 * 2;
        (ring + results + (weights + xs) * 16).next_multiple_of(ALIGNED) + ALIGNED
    }

    fn kernel(self, args: &ScaledMm) -> Option<&'static str> {
        let Activations::Values { float, .. } = args.activations else {
            return None;
        };
        let tile = (self.tokens, self.features);
        Some(match (float, tile, row_wise(args)) {
            (Float::Bf16, (256, 128), true) => "scaled_mm_sm90_values_bf16_128x256",
            (Float::Bf16, (128, 192), true) => "scaled_mm_sm90_values_bf16_192x128",
            (Float::Bf16, (128, 128), true) => "scaled_mm_sm90_values_bf16_128x128",
            (Float::Bf16, (64, 192), true) => "scaled_mm_sm90_values_bf16_192x64",
            (Float::Bf16, (128, 128), false) => "scaled_mm_sm90_values_bf16_128x128_block",
            (Float::F16, (256, 128), true) => "scaled_mm_sm90_values_f16_128x256",
            (Float::F16, (128, 192), true) => "scaled_mm_sm90_values_f16_192x128",
            (Float::F16, (128, 128), true) => "scaled_mm_sm90_values_f16_128x128",
            (Float::F16, (64, 192), true) => "scaled_mm_sm90_values_f16_192x64",
            (Float::F16, (128, 128), false) => "scaled_mm_sm90_values_f16_128x128_block",
            _ => return None,
        })
    }
}

/// # Safety
/// As [`crate::cuda::scaled_mm`]; the device is of compute capability 9.0.
pub(in crate::cuda::scaled_mm) unsafe fn launch(
    stream: &CudaStream,
    gpu: Gpu,
    args: &ScaledMm,
    config: Sm90Values,
) -> Result<(), Error> {
    let params = Params::new(args);
    // Each of a pair copies its part of the activations that both use.
    let [x, weight] = values_maps(args, config.tokens / PAIR, config.features)?;
    let name = config
        .kernel(args)
        .expect("the kernel serves the arguments");
    let kernel = Module::Sm90ScaledMmValues.kernel(name)?;
    let pairs = params.m.div_ceil(config.tokens) * params.n.div_ceil(PAIR * config.features);
    let launch = Launch {
        grid: [PAIR * pairs.min(gpu.processors / PAIR), 1, 1],
        // A warpgroup for each 64 features, and one that copies.
        threads: (config.features / 64 + 1) * 128,
        shared: config.shared(),
        cluster: PAIR,
        dependent: args.dependent,
    };
    // SAFETY: the kernel takes these arguments; the caller vouches for the memory.
    unsafe { launch.run(stream, kernel, args![&params, &x, &weight]) }
}

#[cfg(test)]
mod tests {
    use super::super::SHARED;
    use super::*;

    #[test]
    fn tiles_fit_what_a_block_has() {
        for tile in Sm90Values::all() {
            assert!(tile.shared() <= SHARED, "{tile:?}: {}", tile.shared());
        }
    }
}
