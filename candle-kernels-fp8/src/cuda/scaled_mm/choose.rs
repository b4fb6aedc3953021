//! Which kernel a product gets.

use super::ScaledMm;
use super::skinny::{self, Skinny};
use super::sm90::{Sm90Large, Sm90Small};
use crate::cuda::Gpu;

/// A kernel for products, with the sizes of its tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kernel {
    /// At most 16 rows of activations.
    Skinny(Skinny),
    /// Some more rows, on Hopper.
    Sm90Small(Sm90Small),
    /// Many rows, on Hopper.
    Sm90Large(Sm90Large),
}

impl Kernel {
    /// Every kernel.
    pub fn all() -> Vec<Self> {
        let skinny = Skinny::all().into_iter().map(Self::Skinny);
        let small = Sm90Small::all().into_iter().map(Self::Sm90Small);
        let large = Sm90Large::all().into_iter().map(Self::Sm90Large);
        skinny.chain(small).chain(large).collect()
    }

    /// Whether it computes a product on a device.
    pub fn serves(self, gpu: Gpu, args: &ScaledMm) -> bool {
        match self {
            Self::Skinny(config) => config.serves(args),
            Self::Sm90Small(config) => gpu.is_hopper() && config.serves(args),
            Self::Sm90Large(config) => gpu.is_hopper() && config.serves(args),
        }
    }
}

impl std::fmt::Display for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Skinny(Skinny { rows, warps }) => write!(f, "skinny {rows}/{warps}"),
            Self::Sm90Small(Sm90Small { tokens, blocks }) => write!(f, "small {tokens}/{blocks}"),
            Self::Sm90Large(Sm90Large { features }) => write!(f, "large {features}"),
        }
    }
}

/// The kernel that should be the fastest.
pub(super) fn choose(gpu: Gpu, args: &ScaledMm) -> Kernel {
    if args.m <= skinny::MOST {
        return Kernel::Skinny(Skinny { rows: 16, warps: 8 });
    }
    let _ = gpu;
    if args.m <= 64 {
        return Kernel::Sm90Small(Sm90Small {
            tokens: 64,
            blocks: 2,
        });
    }
    Kernel::Sm90Large(Sm90Large { features: 128 })
}
