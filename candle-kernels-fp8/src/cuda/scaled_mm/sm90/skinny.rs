//! At most 32 rows of activations: a product that is bound by reading the weight.

use cudarc::driver::CudaStream;

use super::{ALIGNED, DEPTH, SHARED, in_boxes, weight_map, x_boxes_map, x_map};
use crate::cuda::Gpu;
use crate::cuda::error::Error;
use crate::cuda::launch::{Launch, args};
use crate::cuda::library::Module;
use crate::cuda::scaled_mm::params::Params;
use crate::cuda::scaled_mm::{ScaledMm, WeightLayout, row_wise};

/// Tiles of a product that is bound by reading the weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Sm90Skinny {
    /// Output features of a tile: a multiple of 8, at most 64.
    pub(in crate::cuda::scaled_mm) rows: u32,
    /// How the weight's part of a stage comes.
    pub(in crate::cuda::scaled_mm) copies: Copies,
}

/// How the copy engine brings a part of a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(in crate::cuda::scaled_mm) enum Copies {
    /// By a tensor map: a copy for each box of a weight in rows, one for all of one in panels.
    Tiles,
    /// A copy for each panel, without a tensor map.
    Pieces,
}

/// Boxes of the weight in a stage, most stages, and most features, as device code says.
const BOXES: u32 = 4;
const MOST_STAGES: u32 = 16;
const MOST_ROWS: u32 = 64;

impl Sm90Skinny {
    pub(in crate::cuda::scaled_mm) fn all() -> Vec<Self> {
        let both = |rows| [Copies::Tiles, Copies::Pieces].map(|copies| Self { rows, copies });
        (8..=MOST_ROWS).step_by(8).flat_map(both).collect()
    }

    /// Tiles that give every multiprocessor about as many features, in as few rounds as there must be.
    pub(in crate::cuda::scaled_mm) fn chosen(gpu: Gpu, args: &ScaledMm) -> Self {
        let most = gpu.processors * MOST_ROWS;
        let n = args.n as u32;
        let rounds = n.div_ceil(most);
        let rows = n.div_ceil(rounds * gpu.processors).next_multiple_of(8);
        let copies = match args.weight_layout {
            WeightLayout::Rows { .. } => Copies::Tiles,
            WeightLayout::Panels => Copies::Pieces,
        };
        Self { rows, copies }
    }

    pub(in crate::cuda::scaled_mm) fn serves(self, args: &ScaledMm) -> bool {
        let comes = self.copies == Copies::Tiles || args.weight_layout == WeightLayout::Panels;
        comes && in_boxes(args) && args.m <= if row_wise(args) { 32 } else { 16 }
    }

    /// Stages of the ring, and bytes of shared memory with what aligning it may cost, as device code lays it out: sums
    /// of two warpgroups for two tiles, scales, barriers; then the ring.
    fn stages_and_shared(self, tokens: u32) -> (u32, u32) {
        let sums = 2 * 2 * tokens * (MOST_ROWS + 4) * 4;
        let before = (sums + tokens * 4 + 2 * MOST_STAGES * 8).next_multiple_of(ALIGNED) + ALIGNED;
        let stage = BOXES * (self.rows + tokens) * DEPTH as u32;
        // Even, so that each of the two warpgroups has stages of its own.
        let stages = ((SHARED - before) / stage / 2 * 2).min(MOST_STAGES);
        (stages, before + stages * stage)
    }

    /// Tokens of an instruction.
    fn tokens(args: &ScaledMm) -> u32 {
        match args.m {
            ..=8 => 8,
            9..=16 => 16,
            _ => 32,
        }
    }

    fn kernel(args: &ScaledMm) -> &'static str {
        match (Self::tokens(args), row_wise(args)) {
            (8, true) => "scaled_mm_sm90_skinny_8",
            (8, false) => "scaled_mm_sm90_skinny_8_block",
            (16, true) => "scaled_mm_sm90_skinny_16",
            (16, false) => "scaled_mm_sm90_skinny_16_block",
            _ => "scaled_mm_sm90_skinny_32",
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
    // Device code goes by the same condition.
    let x = match args.k.is_multiple_of(DEPTH) {
        true => x_boxes_map(args, tokens, BOXES)?,
        false => x_map(args, tokens)?,
    };
    let weight = match config.copies {
        Copies::Tiles => weight_map(args, config.rows, BOXES)?,
        // Not used.
        Copies::Pieces => x,
    };
    let kernel = Module::Sm90ScaledMmSkinny.kernel(Sm90Skinny::kernel(args))?;
    let (stages, shared) = config.stages_and_shared(tokens);
    let launch = Launch {
        grid: [params.n.div_ceil(config.rows).min(gpu.processors), 1, 1],
        threads: 288,
        shared,
        cluster: 1,
        dependent: args.dependent,
    };
    let pieces = u32::from(config.copies == Copies::Pieces);
    let dependent = u32::from(args.dependent);
    // SAFETY: the kernel takes these arguments; the caller vouches for the memory.
    unsafe {
        launch.run(
            stream,
            kernel,
            args![
                &params,
                &x,
                &weight,
                &config.rows,
                &stages,
                &pieces,
                &dependent
            ],
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The instruction reads 64 rows where a stage has fewer: eight of them every `BOXES` atoms, of a weight in panels.
    #[test]
    fn what_is_read_past_a_stage_is_in_the_ring() {
        for config in Sm90Skinny::all() {
            for tokens in [8, 16, 32] {
                let (stages, shared) = config.stages_and_shared(tokens);
                assert!(
                    stages >= 2 && stages.is_multiple_of(2),
                    "{config:?}, {tokens}: {stages}"
                );
                assert!(shared <= SHARED, "{config:?}, {tokens}: {shared}");
                let ring = stages * BOXES * (config.rows + tokens) * DEPTH as u32;
                let last = (stages - 1) * BOXES * config.rows * DEPTH as u32;
                let read = MOST_ROWS * BOXES * DEPTH as u32;
                assert!(
                    last + read <= ring,
                    "{config:?}, {tokens}: {last} + {read} of {ring}"
                );
            }
        }
    }
}
