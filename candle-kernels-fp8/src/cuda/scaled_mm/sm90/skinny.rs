//! At most 64 rows of activations: a product that is bound by reading the weight.

use cudarc::driver::CudaStream;

use super::{ALIGNED, DEPTH, SHARED, in_boxes, tensor_maps};
use crate::cuda::Gpu;
use crate::cuda::error::Error;
use crate::cuda::launch::{Launch, args};
use crate::cuda::library::Module;
use crate::cuda::scaled_mm::params::Params;
use crate::cuda::scaled_mm::{ScaledMm, row_wise};

/// Tiles of a product that is bound by reading the weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Sm90Skinny {
    /// Output features of a tile: a multiple of 8, at most 64.
    pub(in crate::cuda::scaled_mm) rows: u32,
}

/// Most stages, and most features, as device code says.
const MOST_STAGES: u32 = 16;
const MOST_ROWS: u32 = 64;

impl Sm90Skinny {
    pub(in crate::cuda::scaled_mm) fn all() -> Vec<Self> {
        let rows = (8..=MOST_ROWS).step_by(8);
        rows.map(|rows| Self { rows }).collect()
    }

    /// Tiles that give every multiprocessor about as many features, in as few rounds as there must be.
    pub(in crate::cuda::scaled_mm) fn chosen(gpu: Gpu, args: &ScaledMm) -> Self {
        let most = gpu.processors * MOST_ROWS;
        let n = args.n as u32;
        let rounds = n.div_ceil(most);
        let rows = n.div_ceil(rounds * gpu.processors).next_multiple_of(8);
        Self { rows }
    }

    pub(in crate::cuda::scaled_mm) fn serves(self, args: &ScaledMm) -> bool {
        in_boxes(args) && args.m <= 64
    }

    /// Tokens of an instruction.
    fn tokens(args: &ScaledMm) -> u32 {
        match args.m {
            ..=8 => 8,
            9..=16 => 16,
            17..=32 => 32,
            _ => 64,
        }
    }

    fn kernel(args: &ScaledMm) -> &'static str {
        match (Self::tokens(args), row_wise(args)) {
            (8, true) => "scaled_mm_sm90_skinny_8",
            (8, false) => "scaled_mm_sm90_skinny_8_block",
            (16, true) => "scaled_mm_sm90_skinny_16",
            (16, false) => "scaled_mm_sm90_skinny_16_block",
            (32, true) => "scaled_mm_sm90_skinny_32",
            (32, false) => "scaled_mm_sm90_skinny_32_block",
            (_, true) => "scaled_mm_sm90_skinny_64",
            (_, false) => "scaled_mm_sm90_skinny_64_block",
        }
    }
}

/// # Safety
/// As [`crate::cuda::scaled_mm`]; the device is of compute capability 9.0.
pub(in crate::cuda::scaled_mm) unsafe fn launch(
    stream: &CudaStream,
    gpu: Gpu,
    args: &ScaledMm,
    config: Sm90Skinny,
) -> Result<(), Error> {
    let params = Params::new(args);
    let tokens = Sm90Skinny::tokens(args);
    // Boxes of a stage, blocks that share activations, tiles whose sums have room, as device code says.
    let (boxes, blocks, tiles) = if tokens <= 32 { (4, 1, 2) } else { (2, 2, 1) };
    let [x, weight] = tensor_maps(args, tokens / blocks, config.rows)?;
    let kernel = Module::Sm90ScaledMmSkinny.kernel(Sm90Skinny::kernel(args))?;
    let of_rows = row_wise(args);
    // As device code lays it out: sums of two warpgroups, scales, barriers; then the ring, with scales of boxes
    // where they change along K.
    let sums = tiles * 2 * tokens * (MOST_ROWS + 4) * 4;
    let before = (sums + tokens * 4 + 2 * MOST_STAGES * 8).next_multiple_of(ALIGNED) + ALIGNED;
    let scales = if of_rows { 0 } else { (MOST_ROWS + tokens) * 4 };
    let stage = boxes * ((config.rows + tokens) * DEPTH as u32 + scales);
    // Even, so that each of the two warpgroups has stages of its own.
    let stages = ((SHARED - before) / stage / 2 * 2).min(MOST_STAGES);
    let groups = params.n.div_ceil(config.rows * blocks);
    let groups = groups.min(gpu.processors / blocks);
    let launch = Launch {
        grid: [groups * blocks, 1, 1],
        threads: if of_rows { 288 } else { 320 },
        shared: before + stages * stage,
        cluster: blocks,
        dependent: args.dependent,
    };
    let dependent = u32::from(args.dependent);
    // SAFETY: the kernel takes these arguments; the caller vouches for the memory.
    unsafe {
        launch.run(
            stream,
            kernel,
            args![&params, &x, &weight, &config.rows, &stages, &dependent],
        )
    }
}
