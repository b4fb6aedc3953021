//! Which kernel a product gets.

use super::any::Any;
use super::mma::Mma;
use super::skinny::Skinny;
use super::sm90::{Copies, DEPTH, Sm90Large, Sm90Skinny, Sm90Small, Sm90Values, Sm90ValuesSmall};
use super::{Activations, ScaledMm, row_wise};
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
    /// At most 64 rows of codes, on Hopper.
    Sm90Skinny(Sm90Skinny),
    /// Some more rows of codes, on Hopper.
    Sm90Small(Sm90Small),
    /// Many rows of codes, on Hopper.
    Sm90Large(Sm90Large),
    /// Many rows of values, on Hopper.
    Sm90Values(Sm90Values),
    /// Some rows of values, on Hopper.
    Sm90ValuesSmall(Sm90ValuesSmall),
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
        let values = Sm90Values::all().into_iter().map(Self::Sm90Values);
        let values_small = Sm90ValuesSmall::all()
            .into_iter()
            .map(Self::Sm90ValuesSmall);
        let portable = any.chain(mma).chain(skinny);
        portable
            .chain(sm90_skinny)
            .chain(small)
            .chain(large)
            .chain(values)
            .chain(values_small)
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
            Self::Sm90Values(config) => gpu.is_hopper() && config.serves(args),
            Self::Sm90ValuesSmall(config) => gpu.is_hopper() && config.serves(args),
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
            Self::Sm90Values(Sm90Values { tokens, features }) => {
                write!(f, "sm90 values {tokens}x{features}")
            }
            Self::Sm90ValuesSmall(Sm90ValuesSmall { tokens, blocks }) => {
                write!(f, "sm90 values {tokens}/{blocks}")
            }
        }
    }
}

/// Codes of a weight from which on the copy engine's slower start is worth its while.
const LONG: usize = 4 << 20;

/// The kernel for Hopper; none if only portable ones serve, or are faster.
fn sm90(gpu: Gpu, args: &ScaledMm) -> Option<Kernel> {
    if let Activations::Values { .. } = args.activations {
        return sm90_values(gpu, args);
    }
    let skinny = Sm90Skinny::chosen(gpu, args);
    if skinny.serves(args) && args.m <= 32 {
        let short = args.m <= 8 && args.n * args.k <= LONG && !args.dependent;
        return (!short).then_some(Kernel::Sm90Skinny(skinny));
    }
    let skinny = Sm90Skinny::all()
        .into_iter()
        .filter(|config| config.serves(args) && config.copies == Copies::Tiles)
        // The instruction's 64 rows are mostly unused in smaller tiles.
        .filter(|config| config.rows >= 16)
        .map(|config| {
            let micros = skinny_micros(gpu, args, config);
            (Kernel::Sm90Skinny(config), micros)
        });
    let small = Sm90Small::all()
        .into_iter()
        .filter(|config| config.serves(args))
        .map(|config| (Kernel::Sm90Small(config), small_micros(gpu, args, config)));
    let large = Sm90Large::all()
        .into_iter()
        .filter(|config| config.serves(args) && args.m > 64)
        .map(|config| (Kernel::Sm90Large(config), large_micros(gpu, args, config)));
    skinny
        .chain(small)
        .chain(large)
        .min_by(|a, b| a.1.total_cmp(&b.1))
        .map(|(kernel, _)| kernel)
}

/// As [`sm90`], for values: where reading the weight is all that takes time, the portable kernel does as well.
fn sm90_values(gpu: Gpu, args: &ScaledMm) -> Option<Kernel> {
    if Skinny::chosen(gpu, args).serves(args) {
        return None;
    }
    let many = Sm90Values::all()
        .into_iter()
        .filter(|config| config.serves(args))
        .map(|config| (Kernel::Sm90Values(config), values_micros(gpu, args, config)));
    let some = Sm90ValuesSmall::all().into_iter();
    let some = some.filter(|config| config.serves(args)).map(|config| {
        let micros = values_small_micros(gpu, args, config);
        (Kernel::Sm90ValuesSmall(config), micros)
    });
    many.chain(some)
        .min_by(|a, b| a.1.total_cmp(&b.1))
        .map(|(kernel, _)| kernel)
}

/// Microseconds that a kernel should take: what starts and ends it, and for each round of tiles its steps along K, which
/// are slower the more pairs of blocks ask the L2 cache, or the reading of the weight. The constants fit what an H200 took
/// for linears of 8B models and 128 to 8192 rows.
fn large_micros(gpu: Gpu, args: &ScaledMm, config: Sm90Large) -> f64 {
    let (alone, beside_others, end) = match (config.tokens, config.features) {
        (256, _) => (0.58, 0.0020, 0.9),
        (_, 192) => (0.43, 0.0018, 0.9),
        (_, 128) => (0.27, 0.0020, 0.5),
        (_, 96) => (0.20, 0.0017, 0.5),
        _ => (0.12, 0.0020, 0.5),
    };
    let pairs =
        args.m.div_ceil(config.tokens as usize) * args.n.div_ceil(2 * config.features as usize);
    let at_once = gpu.processors as usize / 2;
    let step = alone + beside_others * pairs.min(at_once) as f64;
    let rounds = pairs.div_ceil(at_once);
    let multiply = rounds as f64 * (steps(args) * step + end);
    3.2 + multiply.max(1.15 * read_micros(args))
}

/// As [`large_micros`], of 33 to 64 rows: steps along K, or what the L2 cache gives: a weight, and for each tile the
/// activations, half of which the other block of a pair fetches. A last round that is not whole takes as long as one that is.
/// Scales that change along K come from shared memory, which is as busy as the L2 cache.
fn skinny_micros(gpu: Gpu, args: &ScaledMm, config: Sm90Skinny) -> f64 {
    let tiles = args.n.div_ceil(config.rows as usize);
    let rounds = tiles.div_ceil(gpu.processors as usize);
    let step = 0.107 + 0.0006 * f64::from(config.rows);
    let bytes = ((args.n + tiles * 32) * args.k) as f64;
    let unfair = match rounds {
        1 => 1.0,
        _ => (rounds * gpu.processors as usize) as f64 / tiles as f64,
    };
    let steps = rounds as f64 * steps(args);
    let scales = if row_wise(args) { 0.0 } else { 0.09 * steps };
    3.5 + (steps * step).max(unfair * bytes / L2_BYTES_A_MICRO) + scales
}

/// As [`skinny_micros`], of clusters that share out K, and any number of rows. Of a weight that is read more than once, part
/// counts again.
fn small_micros(gpu: Gpu, args: &ScaledMm, config: Sm90Small) -> f64 {
    let step = match config.tokens {
        32 => 0.20,
        64 => 0.30,
        _ => 0.395,
    };
    let (tokens, blocks) = (config.tokens as usize, config.blocks as usize);
    let readings = args.m.div_ceil(tokens);
    let tiles = readings * args.n.div_ceil(Sm90Small::FEATURES as usize);
    let rounds = (tiles * blocks).div_ceil(in_clusters(gpu, blocks)) as f64;
    let weight = (args.n * args.k) as f64 * (1.0 + 0.13 * (readings - 1) as f64);
    let bytes = weight + (tiles * tokens * args.k) as f64;
    let multiply = rounds * steps(args) / blocks as f64 * step;
    let reduce = blocks as f64 * (0.18 + 0.24 * f64::from(config.tokens) / 64.0);
    3.9 + reduce + multiply.max(bytes / L2_BYTES_A_MICRO)
}

/// As [`large_micros`].
fn values_micros(gpu: Gpu, args: &ScaledMm, config: Sm90Values) -> f64 {
    let (step, end) = match (config.tokens, config.features) {
        (256, _) => (1.23, 0.9),
        (64, _) => (0.60, 0.5),
        (_, 192) => (1.03, 0.9),
        _ => (0.89, 0.6),
    };
    let pairs =
        args.m.div_ceil(config.tokens as usize) * args.n.div_ceil(2 * config.features as usize);
    let rounds = pairs.div_ceil(gpu.processors as usize / 2);
    let multiply = rounds as f64 * (steps(args) * step + end);
    3.0 + multiply.max(1.15 * read_micros(args))
}

/// As [`values_micros`]; where there are few tokens, instructions that widen weights take longer than those that
/// multiply.
fn values_small_micros(gpu: Gpu, args: &ScaledMm, config: Sm90ValuesSmall) -> f64 {
    let step = match config.tokens {
        ..=32 => 0.45,
        64 => 0.57,
        _ => 0.80,
    };
    split_micros(gpu, args, (config.tokens, config.blocks), step)
}

/// Microseconds of a kernel whose clusters of `blocks` share out K of 128 features and so many tokens, at `step` for a
/// step along K.
fn split_micros(gpu: Gpu, args: &ScaledMm, (tokens, blocks): (u32, u32), step: f64) -> f64 {
    let tiles = args.m.div_ceil(tokens as usize) * args.n.div_ceil(Sm90Small::FEATURES as usize);
    let blocks = blocks as usize;
    let rounds = (tiles * blocks).div_ceil(in_clusters(gpu, blocks)) as f64;
    let multiply = steps(args) / blocks as f64 * step;
    let reduce = 0.7 + 0.7 * blocks as f64;
    let read = read_micros(args) - 2.0;
    1.5 + (rounds * (multiply + 3.5 + reduce)).max(read + 3.5 + reduce)
}

/// Multiprocessors that clusters of so many blocks can have: those of more than two leave some out.
fn in_clusters(gpu: Gpu, blocks: usize) -> usize {
    match blocks {
        ..=2 => gpu.processors as usize,
        _ => gpu.processors as usize * 9 / 10,
    }
}

/// What an H200's L2 cache gives all multiprocessors in a microsecond, while it reads from memory.
const L2_BYTES_A_MICRO: f64 = 5.75e6;

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
    use crate::cuda::{Accumulation, Float, Scaling, WeightLayout};

    const BLOCK: ScaleLayout = ScaleLayout::Block {
        rows: 128,
        cols: 128,
    };

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

    /// The fastest of all on an H200, or within 3% of it.
    #[test]
    fn some_rows_get_what_was_fast() {
        for (m, n, k, name) in [
            (64, 6144, 4096, "sm90 skinny 64"),
            (64, 4096, 4096, "sm90 skinny 56"),
            (64, 28672, 4096, "sm90 small 64/1"),
            (64, 4096, 14336, "sm90 skinny 56"),
            (64, 1024, 2048, "sm90 skinny 16"),
            (128, 6144, 4096, "sm90 large 128x64"),
            (128, 4096, 4096, "sm90 large 128x64"),
            (128, 28672, 4096, "sm90 large 128x128"),
            (128, 1024, 2048, "sm90 small 32/3"),
            (128, 2048, 4096, "sm90 small 32/2"),
            (256, 1024, 2048, "sm90 small 32/2"),
            (256, 2048, 4096, "sm90 large 128x64"),
            (512, 6144, 4096, "sm90 large 128x192"),
            (512, 4096, 4096, "sm90 large 128x128"),
            (512, 1024, 2048, "sm90 large 128x64"),
            (1024, 4096, 14336, "sm90 large 256x128"),
            (1024, 2048, 4096, "sm90 large 128x128"),
        ] {
            for layout in layouts(k) {
                let kernel = Kernel::chosen(HOPPER, &product((m, n, k), layout));
                assert_eq!(kernel.to_string(), name, "{m} x {n} x {k}");
            }
        }
    }

    /// As above, with scales of blocks.
    #[test]
    fn scales_along_k_change_what_is_chosen() {
        for (m, n, k, name) in [
            (16, 4096, 14336, "sm90 skinny 48 pieces"),
            (32, 4096, 4096, "sm90 skinny 32 pieces"),
            (64, 6144, 4096, "sm90 small 64/2"),
            (64, 4096, 4096, "sm90 small 32/2"),
            (64, 4096, 14336, "sm90 small 64/3"),
            (64, 28672, 4096, "sm90 small 64/1"),
        ] {
            let mut args = product((m, n, k), WeightLayout::Panels);
            args.layout = BLOCK;
            args.activations = Activations::Codes {
                codes: 0,
                scales: 0,
                scaling: Scaling::Group(128),
            };
            let kernel = Kernel::chosen(HOPPER, &args);
            assert_eq!(kernel.to_string(), name, "{m} x {n} x {k}");
        }
    }

    /// Tiles of few rows have scales of two rows of blocks; all boxes' scales are in shared memory at once.
    #[test]
    fn scales_that_tiles_of_few_rows_cannot_take_are_left_to_others() {
        for (rows, k, few_rows) in [
            (128, 4096, true),
            (64, 4096, true),
            (32, 4096, true),
            (8, 4096, false),
            (128, 1 << 20, false),
        ] {
            let mut args = product((32, 4096, k), WeightLayout::Panels);
            args.layout = ScaleLayout::Block { rows, cols: 128 };
            let kernel = Kernel::chosen(HOPPER, &args);
            assert!(kernel.serves(HOPPER, &args), "{kernel}: {rows}, {k}");
            let few = matches!(kernel, Kernel::Sm90Skinny(_));
            assert_eq!(few, few_rows, "{kernel}: {rows}, {k}");
        }
    }

    fn of_values(
        gpu: Gpu,
        sizes: (usize, usize, usize),
        float: Float,
        layout: ScaleLayout,
    ) -> String {
        let args = ScaledMm {
            activations: Activations::Values { values: 0, float },
            layout,
            ..product(sizes, WeightLayout::Panels)
        };
        Kernel::chosen(gpu, &args).to_string()
    }

    #[test]
    fn values_get_a_kernel_by_their_rows_on_hopper() {
        let kernel = |m, float, layout| of_values(HOPPER, (m, 4096, 4096), float, layout);
        for float in [Float::Bf16, Float::F16] {
            for layout in [ScaleLayout::Channel, ScaleLayout::Tensor, BLOCK] {
                assert!(kernel(1, float, layout).starts_with("skinny"));
                assert!(kernel(17, float, layout).starts_with("sm90 values 32/"));
                assert!(kernel(64, float, layout).starts_with("sm90 values "));
                assert!(kernel(512, float, layout).starts_with("sm90 values 128"));
            }
            assert_eq!(
                kernel(2048, float, ScaleLayout::Channel),
                "sm90 values 256x128"
            );
            assert_eq!(kernel(2048, float, BLOCK), "sm90 values 128x128");
        }
        assert!(kernel(2048, Float::F32, BLOCK).starts_with("any"));
        let qkv = of_values(HOPPER, (512, 6144, 4096), Float::Bf16, ScaleLayout::Channel);
        assert_eq!(qkv, "sm90 values 128x192");
    }

    #[test]
    fn values_of_any_length_are_served_on_hopper_only() {
        let kernel = |gpu, k| of_values(gpu, (100, 300, k), Float::Bf16, ScaleLayout::Channel);
        for k in [1, 77, 1001, 4096] {
            assert!(kernel(HOPPER, k).starts_with("sm90 values"));
            assert!(kernel(ADA, k).starts_with("mma"));
        }
    }

    #[test]
    fn blocks_of_scales_that_tiles_cannot_take_are_left_to_others() {
        for (rows, cols, name) in [
            (64, 128, "sm90 values"),
            (128, 512, "sm90 values"),
            (32, 128, "mma"),
            (128, 64, "mma"),
            (128, 48, "any"),
        ] {
            let layout = ScaleLayout::Block { rows, cols };
            let kernel = of_values(HOPPER, (512, 4096, 4096), Float::Bf16, layout);
            assert!(kernel.starts_with(name), "{layout:?}: {kernel}");
        }
    }
}
