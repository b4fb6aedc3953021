//! At most 64 rows of activations: a product that is bound by reading the weight.

use cudarc::driver::CudaStream;

use super::{ALIGNED, DEPTH, SHARED, in_boxes, weight_map, x_boxes_map, x_map};
use crate::ScaleLayout;
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

/// Most stages, and most features, as device code says.
const MOST_STAGES: u32 = 16;
const MOST_ROWS: u32 = 64;

/// Bytes of a weight that about fill the shared memory of a multiprocessor.
const RING: u32 = 160 * 1024;

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
        let rows = match args.dependent {
            // Such launches run beside each other, where one leaves multiprocessors to the next.
            true => rows.max((RING / args.k as u32).next_multiple_of(8).min(MOST_ROWS)),
            // Memory is busy without all multiprocessors, and fewer blocks fetch the activations fewer times.
            false if args.m <= 16 => rows.max((n / 32).next_multiple_of(8).min(48)),
            false if args.m <= 32 => rows.max((n / 64).next_multiple_of(8).min(32)),
            false => rows,
        };
        let copies = match args.weight_layout {
            // Where pairs of blocks share activations, many copies come late.
            WeightLayout::Panels if args.m <= 32 => Copies::Pieces,
            _ => Copies::Tiles,
        };
        Self { rows, copies }
    }

    pub(in crate::cuda::scaled_mm) fn serves(self, args: &ScaledMm) -> bool {
        let comes = match self.copies {
            Copies::Tiles => true,
            Copies::Pieces => args.weight_layout == WeightLayout::Panels && args.m <= 32,
        };
        // Features of a tile lie in two rows of blocks at most.
        let scales = match args.layout {
            ScaleLayout::Block { rows, .. } => rows >= args.n.min(self.rows as usize),
            _ => true,
        };
        comes && scales && in_boxes(args) && args.m <= 64 && self.ring(args).stages >= 2
    }

    /// How the tiles of a product lie in shared memory.
    fn ring(self, args: &ScaledMm) -> Ring {
        let boxes = if row_wise(args) {
            0
        } else {
            args.k.div_ceil(DEPTH)
        };
        Ring::new(self.rows, Self::tokens(args), boxes as u32)
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

/// The ring of tiles, as device code lays it out.
#[derive(Debug, Clone, Copy)]
struct Ring {
    /// Boxes of 128 codes along K in a stage.
    boxes: u32,
    /// Blocks that share activations.
    blocks: u32,
    stages: u32,
    /// Bytes of shared memory, with what aligning it may cost.
    shared: u32,
}

impl Ring {
    /// With scales of `scaled` boxes along K: none where they do not change along it.
    fn new(rows: u32, tokens: u32, scaled: u32) -> Self {
        let (boxes, blocks, tiles) = match tokens {
            ..=16 => (8, 1, 2),
            17..=32 => (4, 1, 2),
            _ => (2, 2, 1),
        };
        // Sums of two warpgroups, for so many tiles, scales, barriers; then the stages; then scales that change along K,
        // of tokens, and of two tiles in two rows of blocks each.
        let sums = tiles * 2 * tokens * (MOST_ROWS + 4) * 4;
        let before = (sums + tokens * 4 + 2 * MOST_STAGES * 8).next_multiple_of(ALIGNED) + ALIGNED;
        let scales = scaled.next_multiple_of(boxes) * (tokens + 2 + 4) * 4;
        let stage = boxes * (rows + tokens) * DEPTH as u32;
        let stages = (SHARED.saturating_sub(before + scales) / stage).min(MOST_STAGES);
        Self {
            boxes,
            blocks,
            stages,
            shared: before + stages * stage + scales,
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
    let ring = config.ring(args);
    let (boxes, blocks) = (ring.boxes, ring.blocks);
    // Device code goes by the same condition.
    let x = match blocks == 1 && args.k.is_multiple_of(DEPTH) {
        true => x_boxes_map(args, tokens, boxes)?,
        false => x_map(args, tokens / blocks)?,
    };
    let weight = match config.copies {
        Copies::Tiles => weight_map(args, config.rows, boxes)?,
        // Not used.
        Copies::Pieces => x,
    };
    let kernel = Module::Sm90ScaledMmSkinny.kernel(Sm90Skinny::kernel(args))?;
    let groups = params.n.div_ceil(config.rows * blocks);
    let groups = groups.min(gpu.processors / blocks);
    let launch = Launch {
        grid: [groups * blocks, 1, 1],
        threads: 288,
        shared: ring.shared,
        cluster: blocks,
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
                &ring.stages,
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
        for rows in (8..=MOST_ROWS).step_by(8) {
            for (tokens, scaled) in [8, 16, 32, 64].into_iter().flat_map(|m| [(m, 0), (m, 32)]) {
                let ring = Ring::new(rows, tokens, scaled);
                let Ring {
                    boxes,
                    stages,
                    shared,
                    ..
                } = ring;
                assert!(stages >= 2, "{rows}, {tokens}: {ring:?}");
                assert!(shared <= SHARED, "{rows}, {tokens}: {ring:?}");
                let all = stages * boxes * (rows + tokens) * DEPTH as u32;
                let last = (stages - 1) * boxes * rows * DEPTH as u32;
                let read = MOST_ROWS * boxes * DEPTH as u32;
                assert!(
                    last + read <= all,
                    "{rows}, {tokens}: {last} + {read} of {all}"
                );
            }
        }
    }
}
