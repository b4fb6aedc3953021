//! Which kernel a product gets.

use super::ScaledMm;
use super::any::Any;
use super::mma::Mma;
use super::skinny::Skinny;
use super::sm90::{Copies, DEPTH, Sm90Large, Sm90Skinny, Sm90Small};
use crate::cuda::Gpu;

/// A kernel for products, with the sizes of its tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kernel {
    /// Any sizes, scales and types.
    Any(Any),
    /// Tensor cores of every card since Ada.
    Mma(Mma),
    /// At most 16 rows of activations.
    Skinny(Skinny),
    /// At most 32 rows of codes, on Hopper.
    Sm90Skinny(Sm90Skinny),
    /// Some more rows of codes, on Hopper.
    Sm90Small(Sm90Small),
    /// Many rows of codes, on Hopper.
    Sm90Large(Sm90Large),
}

impl Kernel {
    /// Every kernel.
    pub fn all() -> Vec<Self> {
        let any = Any::all().into_iter().map(Self::Any);
        let mma = Mma::all().into_iter().map(Self::Mma);
        let skinny = Skinny::all().into_iter().map(Self::Skinny);
        let sm90_skinny = Sm90Skinny::all().into_iter().map(Self::Sm90Skinny);
        let small = Sm90Small::all().into_iter().map(Self::Sm90Small);
        let large = Sm90Large::all().into_iter().map(Self::Sm90Large);
        let portable = any.chain(mma).chain(skinny);
        portable
            .chain(sm90_skinny)
            .chain(small)
            .chain(large)
            .collect()
    }

    /// The one that should be the fastest on a device.
    pub fn chosen(gpu: Gpu, args: &ScaledMm) -> Self {
        let hopper = gpu.is_hopper().then(|| sm90(gpu, args)).flatten();
        let skinny = || {
            let skinny = Skinny::chosen(gpu, args);
            skinny.serves(args).then_some(Self::Skinny(skinny))
        };
        let mma = || Mma::chosen(gpu, args).map(Self::Mma);
        hopper
            .or_else(skinny)
            .or_else(mma)
            .unwrap_or_else(|| Self::Any(Any::chosen(args)))
    }

    /// Whether it computes a product on a device.
    pub fn serves(self, gpu: Gpu, args: &ScaledMm) -> bool {
        match self {
            Self::Any(config) => config.serves(args),
            Self::Mma(config) => config.serves(args),
            Self::Skinny(config) => config.serves(args),
            Self::Sm90Skinny(config) => gpu.is_hopper() && config.serves(args),
            Self::Sm90Small(config) => gpu.is_hopper() && config.serves(args),
            Self::Sm90Large(config) => gpu.is_hopper() && config.serves(args),
        }
    }
}

impl std::fmt::Display for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Any(Any { tokens }) => write!(f, "any {tokens}"),
            Self::Mma(Mma { features, tokens }) => write!(f, "mma {features}x{tokens}"),
            Self::Skinny(Skinny { rows }) => write!(f, "skinny {rows}"),
            Self::Sm90Skinny(Sm90Skinny { rows, copies }) => match copies {
                Copies::Tiles => write!(f, "sm90 skinny {rows}"),
                Copies::Pieces => write!(f, "sm90 skinny {rows} pieces"),
            },
            Self::Sm90Small(Sm90Small { tokens, blocks }) => {
                write!(f, "sm90 small {tokens}/{blocks}")
            }
            Self::Sm90Large(Sm90Large { tokens, features }) => {
                write!(f, "sm90 large {tokens}x{features}")
            }
        }
    }
}

/// Codes of a weight from which on the copy engine's slower start is worth its while.
const LONG: usize = 4 << 20;

/// The kernel for Hopper; none if only portable ones serve, or are faster.
fn sm90(gpu: Gpu, args: &ScaledMm) -> Option<Kernel> {
    let skinny = Sm90Skinny::chosen(gpu, args);
    if skinny.serves(args) {
        let short = args.m <= 8 && args.n * args.k <= LONG;
        return (!short).then_some(Kernel::Sm90Skinny(skinny));
    }
    let small = Sm90Small::all()
        .into_iter()
        .filter(|config| config.serves(args))
        .map(|config| (Kernel::Sm90Small(config), small_micros(gpu, args, config)));
    let large = Sm90Large::all()
        .into_iter()
        .filter(|config| config.serves(args) && args.m > 64)
        .map(|config| (Kernel::Sm90Large(config), large_micros(gpu, args, config)));
    small
        .chain(large)
        .min_by(|a, b| a.1.total_cmp(&b.1))
        .map(|(kernel, _)| kernel)
}

/// Microseconds that a kernel should take: what starts and ends it, and for each round of tiles its steps along K, or the
/// reading of the weight. The constants fit what an H200 took for linears of 8B models and 64 to 8192 rows.
fn large_micros(gpu: Gpu, args: &ScaledMm, config: Sm90Large) -> f64 {
    let (step, end) = match (config.tokens, config.features) {
        (256, _) => (0.735, 0.9),
        (_, 192) => (0.56, 0.9),
        (_, 128) => (0.40, 0.5),
        (_, 96) => (0.31, 0.5),
        _ => (0.255, 0.5),
    };
    let pairs =
        args.m.div_ceil(config.tokens as usize) * args.n.div_ceil(2 * config.features as usize);
    let rounds = pairs.div_ceil(gpu.processors as usize / 2);
    let multiply = rounds as f64 * (steps(args) * step + end);
    3.0 + multiply.max(1.15 * read_micros(args))
}

/// As [`large_micros`].
fn small_micros(gpu: Gpu, args: &ScaledMm, config: Sm90Small) -> f64 {
    let step = match config.tokens {
        32 => 0.23,
        64 => 0.28,
        _ => 0.42,
    };
    let tiles =
        args.m.div_ceil(config.tokens as usize) * args.n.div_ceil(Sm90Small::FEATURES as usize);
    let blocks = config.blocks as usize;
    // Clusters of more than two leave some multiprocessors without one.
    let processors = match blocks {
        ..=2 => gpu.processors as usize,
        _ => gpu.processors as usize * 9 / 10,
    };
    let rounds = (tiles * blocks).div_ceil(processors) as f64;
    let multiply = steps(args) / blocks as f64 * step;
    let reduce = 0.7 + 0.7 * blocks as f64;
    let read = read_micros(args) - 2.0;
    1.5 + (rounds * (multiply + 3.5 + reduce)).max(read + 3.5 + reduce)
}

/// Microseconds in which an H200's memory gives the weight.
fn read_micros(args: &ScaledMm) -> f64 {
    (args.n * args.k) as f64 / 4e6
}

/// Steps along K.
fn steps(args: &ScaledMm) -> f64 {
    args.k.div_ceil(DEPTH) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ScaleLayout;
    use crate::cuda::{Accumulation, Activations, Float, Scaling, WeightLayout};

    const HOPPER: Gpu = Gpu {
        capability: (9, 0),
        processors: 132,
    };
    const ADA: Gpu = Gpu {
        capability: (8, 9),
        processors: 142,
    };

    fn product((m, n, k): (usize, usize, usize), weight_layout: WeightLayout) -> ScaledMm {
        ScaledMm {
            m,
            n,
            k,
            activations: Activations::Codes {
                codes: 0,
                scales: 0,
                scaling: Scaling::Token,
            },
            row_stride: k.next_multiple_of(16),
            weight: 0,
            weight_layout,
            weight_scales: 0,
            layout: ScaleLayout::Channel,
            bias: None,
            out: 0,
            out_float: Float::Bf16,
            accumulation: Accumulation::Promoted,
            dependent: false,
        }
    }

    fn layouts(k: usize) -> [WeightLayout; 2] {
        let stride = k.next_multiple_of(16);
        [WeightLayout::Rows { stride }, WeightLayout::Panels]
    }

    /// Whatever the sizes are: those of a row of codes, too.
    #[test]
    fn what_is_chosen_serves() {
        let values = |float| Activations::Values { values: 0, float };
        for m in [1, 8, 16, 17, 32, 33, 64, 100, 300, 3000] {
            for (n, k) in [
                (1, 1),
                (6144, 4096),
                (1000, 100),
                (300, 2055),
                (28672, 4096),
            ] {
                for layout in layouts(k) {
                    let codes = product((m, n, k), layout);
                    let mut all = vec![codes];
                    for float in [Float::Bf16, Float::F16, Float::F32] {
                        all.push(ScaledMm {
                            activations: values(float),
                            ..codes
                        });
                    }
                    for args in all {
                        for gpu in [HOPPER, ADA] {
                            let kernel = Kernel::chosen(gpu, &args);
                            assert!(kernel.serves(gpu, &args), "{kernel}: {args:?}");
                            let float32 = match args.activations {
                                Activations::Values { float, .. } => float == Float::F32,
                                Activations::Codes { .. } => false,
                            };
                            let any = matches!(kernel, Kernel::Any(_));
                            assert_eq!(any, float32, "{kernel}: {args:?}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn the_layout_of_a_weight_says_how_it_is_copied() {
        let chosen =
            layouts(4096).map(|layout| Kernel::chosen(HOPPER, &product((1, 6144, 4096), layout)));
        assert_eq!(
            chosen.map(|kernel| kernel.to_string()),
            ["sm90 skinny 48", "sm90 skinny 48 pieces"]
        );
    }
}
