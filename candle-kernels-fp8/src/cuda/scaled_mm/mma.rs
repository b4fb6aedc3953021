//! Products on the tensor core instructions that every card since Ada has.

use cudarc::driver::CudaStream;

use super::params::Params;
use super::{Accumulation, Activations, ScaledMm, Scaling, row_wise};
use crate::cuda::error::Error;
use crate::cuda::launch::{Launch, args};
use crate::cuda::library::Module;
use crate::cuda::{Float, Gpu};

/// A block's tile of a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Mma {
    /// Output features of a block.
    pub(super) features: u32,
    /// Tokens of a block.
    pub(super) tokens: u32,
}

/// Activations that the instructions take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operand {
    E4m3,
    Bf16,
    F16,
}

impl Operand {
    fn of(args: &ScaledMm) -> Option<Self> {
        match args.activations {
            Activations::Codes { .. } => Some(Self::E4m3),
            Activations::Values { float, .. } => match float {
                Float::Bf16 => Some(Self::Bf16),
                Float::F16 => Some(Self::F16),
                Float::F32 => None,
            },
        }
    }

    /// Elements of a row that a tile holds, in 128 bytes of activations, as device code says (`DEPTH`).
    fn depth(self) -> usize {
        match self {
            Self::E4m3 => 128,
            Self::Bf16 | Self::F16 => 64,
        }
    }
}

impl Mma {
    pub(super) fn all() -> Vec<Self> {
        [(256, 128), (128, 128), (64, 64), (64, 32)]
            .map(|(features, tokens)| Self { features, tokens })
            .into()
    }

    /// The tile that should be the fastest of those that serve; none if none serves.
    pub(super) fn chosen(gpu: Gpu, args: &ScaledMm) -> Option<Self> {
        let serving = Self::all().into_iter().filter(|tile| tile.serves(args));
        serving.min_by_key(|tile| {
            // Every multiprocessor computes as many tiles as the busiest one. What a product of two numbers costs, in
            // percent: the smaller the tile, the more bytes and expansions of weights there are for each.
            let percent = match (tile.features, tile.tokens) {
                (256, _) => 100,
                (128, _) => 110,
                (_, 64) => 150,
                _ => 220,
            };
            let area = u64::from(tile.features * tile.tokens);
            tile.blocks(args).div_ceil(gpu.processors.into()) * area * percent
        })
    }

    pub(super) fn serves(self, args: &ScaledMm) -> bool {
        let Some(operand) = Operand::of(args) else {
            return false;
        };
        // Scales may change from tile to tile along K, and in any way along features and tokens.
        let whole = |run: usize| run >= args.k || run.is_multiple_of(operand.depth());
        let group = match args.activations {
            Activations::Codes {
                scaling: Scaling::Group(group),
                ..
            } => group,
            _ => args.k,
        };
        whole(group)
            && whole(args.layout.run(args.k))
            // The largest tile has no room for sums of parts.
            && (self.features < 256 || operand != Operand::E4m3 && row_wise(args))
            && self.blocks(args) <= i32::MAX as u64
    }

    fn blocks(self, args: &ScaledMm) -> u64 {
        let of = |size: usize, tile: u32| size.div_ceil(tile as usize) as u64;
        of(args.n, self.features) * of(args.m, self.tokens)
    }

    fn threads(self) -> u32 {
        if self.features == 64 { 128 } else { 256 }
    }

    /// Stages of the ring of tiles, as device code says.
    fn stages(self, operand: Operand, row_wise: bool) -> u32 {
        match (self.features, self.tokens) {
            (256, _) => 3,
            (128, _) if operand == Operand::E4m3 || !row_wise => 3,
            (128, _) => 4,
            (_, 64) if operand == Operand::E4m3 => 5,
            _ => 6,
        }
    }

    /// Bytes of shared memory, as device code lays it out.
    fn shared(self, operand: Operand, row_wise: bool) -> u32 {
        let codes = self.features * operand.depth() as u32;
        let scales = if row_wise {
            0
        } else {
            (self.features + self.tokens) * 4
        };
        self.stages(operand, row_wise) * (codes + self.tokens * 128 + scales)
    }

    fn kernel(self, operand: Operand, row_wise: bool, accumulation: Accumulation) -> &'static str {
        macro_rules! names {
            ($name:literal) => {
                match (self.features, self.tokens, row_wise) {
                    (256, _, _) => concat!("scaled_mm_mma_", $name, "_256x128"),
                    (128, _, true) => concat!("scaled_mm_mma_", $name, "_128x128"),
                    (128, _, false) => concat!("scaled_mm_mma_", $name, "_128x128_block"),
                    (_, 64, true) => concat!("scaled_mm_mma_", $name, "_64x64"),
                    (_, 64, false) => concat!("scaled_mm_mma_", $name, "_64x64_block"),
                    (_, _, true) => concat!("scaled_mm_mma_", $name, "_64x32"),
                    (_, _, false) => concat!("scaled_mm_mma_", $name, "_64x32_block"),
                }
            };
        }
        let fast = accumulation == Accumulation::Fast && self.features == 128 && row_wise;
        match operand {
            Operand::E4m3 if fast => "scaled_mm_mma_e4m3_128x128_fast",
            Operand::E4m3 => names!("e4m3"),
            Operand::Bf16 => names!("bf16"),
            Operand::F16 => names!("f16"),
        }
    }
}

/// # Safety
/// As [`super::scaled_mm`].
pub(super) unsafe fn launch(
    stream: &CudaStream,
    args: &ScaledMm,
    config: Mma,
) -> Result<(), Error> {
    let params = Params::new(args);
    let operand = Operand::of(args).expect("F32 activations are not served");
    let row_wise = row_wise(args);
    let kernel = Module::ScaledMmMma.kernel(config.kernel(operand, row_wise, args.accumulation))?;
    let launch = Launch {
        grid: [config.blocks(args) as u32, 1, 1],
        threads: config.threads(),
        shared: config.shared(operand, row_wise),
        cluster: 1,
        dependent: args.dependent,
    };
    // SAFETY: the kernel takes these arguments; the caller vouches for the memory.
    unsafe { launch.run(stream, kernel, args![&params]) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ScaleLayout::{self, Block, Channel, Tensor};
    use crate::cuda::WeightLayout;

    const LARGE: Mma = Mma {
        features: 128,
        tokens: 128,
    };
    const LARGEST: Mma = Mma {
        features: 256,
        tokens: 128,
    };

    fn codes(scaling: Scaling) -> Activations {
        Activations::Codes {
            codes: 0,
            scales: 0,
            scaling,
        }
    }

    fn values(float: Float) -> Activations {
        Activations::Values { values: 0, float }
    }

    fn product(
        (m, n, k): (usize, usize, usize),
        activations: Activations,
        layout: ScaleLayout,
    ) -> ScaledMm {
        ScaledMm {
            m,
            n,
            k,
            activations,
            row_stride: k.next_multiple_of(16),
            weight: 0,
            weight_layout: WeightLayout::Panels,
            weight_scales: 0,
            layout,
            bias: None,
            out: 0,
            out_float: Float::Bf16,
            accumulation: Accumulation::Promoted,
            dependent: false,
        }
    }

    #[test]
    fn serves_scales_that_change_from_tile_to_tile() {
        let serves =
            |k, activations, layout| LARGE.serves(&product((40, 300, k), activations, layout));
        let block = |rows, cols| Block { rows, cols };
        for layout in [
            Tensor,
            Channel,
            block(128, 128),
            block(7, 256),
            block(1, 4000),
        ] {
            for scaling in [
                Scaling::Tensor,
                Scaling::Token,
                Scaling::Group(128),
                Scaling::Group(512),
                Scaling::Group(4000),
            ] {
                assert!(serves(272, codes(scaling), layout));
                assert!(serves(270, codes(scaling), layout));
            }
            assert!(serves(272, values(Float::Bf16), layout));
            assert!(serves(272, values(Float::F16), layout));
            assert!(!serves(272, values(Float::F32), layout));
        }
        assert!(!serves(272, codes(Scaling::Group(64)), Tensor));
        assert!(!serves(272, codes(Scaling::Token), block(128, 64)));
        // As a group of the whole row.
        assert!(serves(64, codes(Scaling::Group(64)), Tensor));
        assert!(serves(272, values(Float::Bf16), block(128, 64)));
        assert!(!serves(272, values(Float::Bf16), block(128, 32)));
    }

    #[test]
    fn the_largest_tile_is_for_values_and_scales_of_rows() {
        let serves =
            |activations, layout| LARGEST.serves(&product((40, 300, 272), activations, layout));
        let block = Block {
            rows: 128,
            cols: 128,
        };
        assert!(serves(values(Float::F16), Channel));
        assert!(!serves(values(Float::F16), block));
        assert!(!serves(codes(Scaling::Token), Channel));
    }

    #[test]
    fn tiles_fit_what_a_block_has_on_ada() {
        for tile in Mma::all() {
            for operand in [Operand::E4m3, Operand::Bf16, Operand::F16] {
                for row_wise in [false, true] {
                    if tile.features < 256 || row_wise && operand != Operand::E4m3 {
                        let shared = tile.shared(operand, row_wise);
                        assert!(
                            shared <= 99 * 1024,
                            "{tile:?} {operand:?} {row_wise}: {shared}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn tiles_grow_with_the_product() {
        let gpu = Gpu {
            capability: (9, 0),
            processors: 132,
        };
        let tile = |m, n, activations| {
            let tile = Mma::chosen(gpu, &product((m, n, 4096), activations, Channel)).unwrap();
            (tile.features, tile.tokens)
        };
        let (half, code) = (values(Float::Bf16), codes(Scaling::Token));
        assert_eq!(tile(17, 4096, half), (64, 32));
        assert_eq!(tile(128, 4096, half), (64, 64));
        assert_eq!(tile(512, 4096, half), (128, 128));
        assert_eq!(tile(4096, 4096, half), (256, 128));
        assert_eq!(tile(4096, 4096, code), (128, 128));
        let f32 = product((8, 8, 4096), values(Float::F32), Channel);
        assert_eq!(Mma::chosen(gpu, &f32), None);
    }
}
