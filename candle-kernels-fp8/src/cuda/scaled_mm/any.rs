//! Products of any sizes and scales: for what no faster kernel serves.

use cudarc::driver::CudaStream;

use super::params::Params;
use super::{Activations, ScaledMm};
use crate::cuda::Float;
use crate::cuda::error::Error;
use crate::cuda::launch::{Launch, args};
use crate::cuda::library::Module;

/// A block's tile of a product of any kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Any {
    /// Tokens of a block: 8 or 64.
    pub(super) tokens: u32,
}

impl Any {
    pub(super) fn all() -> Vec<Self> {
        [8, 64].map(|tokens| Self { tokens }).into()
    }

    /// The tile that wastes less.
    pub(super) fn chosen(args: &ScaledMm) -> Self {
        let tokens = if args.m <= 16 { 8 } else { 64 };
        Self { tokens }
    }

    /// Everything, as long as blocks can be counted.
    pub(super) fn serves(self, args: &ScaledMm) -> bool {
        self.blocks(args) <= i32::MAX as usize
    }

    /// Output features of a block, as device code says.
    fn features(self) -> usize {
        if self.tokens == 8 { 32 } else { 64 }
    }

    fn blocks(self, args: &ScaledMm) -> usize {
        args.m.div_ceil(self.tokens as usize) * args.n.div_ceil(self.features())
    }

    fn kernel(self, args: &ScaledMm) -> &'static str {
        let float = match args.activations {
            Activations::Codes { .. } => None,
            Activations::Values { float, .. } => Some(float),
        };
        match (float, self.tokens) {
            (None, 8) => "scaled_mm_any_e4m3_few",
            (None, _) => "scaled_mm_any_e4m3",
            (Some(Float::Bf16), 8) => "scaled_mm_any_bf16_few",
            (Some(Float::Bf16), _) => "scaled_mm_any_bf16",
            (Some(Float::F16), 8) => "scaled_mm_any_f16_few",
            (Some(Float::F16), _) => "scaled_mm_any_f16",
            (Some(Float::F32), 8) => "scaled_mm_any_f32_few",
            (Some(Float::F32), _) => "scaled_mm_any_f32",
        }
    }
}

/// # Safety
/// As [`super::scaled_mm`].
pub(super) unsafe fn launch(
    stream: &CudaStream,
    args: &ScaledMm,
    config: Any,
) -> Result<(), Error> {
    let params = Params::new(args);
    let kernel = Module::ScaledMmAny.kernel(config.kernel(args))?;
    let launch = Launch {
        grid: [config.blocks(args) as u32, 1, 1],
        threads: 256,
        shared: 0,
        cluster: 1,
        dependent: args.dependent,
    };
    // SAFETY: the kernel takes these arguments; the caller vouches for the memory.
    unsafe { launch.run(stream, kernel, args![&params]) }
}
