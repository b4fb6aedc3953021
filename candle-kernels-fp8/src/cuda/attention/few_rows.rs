//! Attention of few queries: the keys of a sequence are split among blocks.

use cudarc::driver::CudaStream;

use super::Attention;
use super::params::Params;
use crate::cuda::Gpu;
use crate::cuda::error::Error;
use crate::cuda::launch::{Launch, args};
use crate::cuda::library::Module;
use crate::cuda::rows::size;

/// Queries of a sequence for which this is the fastest way.
pub(super) const MOST_QUERIES: usize = 16;

/// Warps of a block. Device twin: in `kernels/attention_few_rows.cu`.
const WARPS: usize = 8;
/// Rows of a block, at most.
const MOST_ROWS: usize = 16;
/// Parts of the keys, at most: one block adds them up.
const MOST_SPLITS: usize = 128;

/// Heads of keys and blocks of rows whose keys are split, at most: with so many there are blocks enough.
const MOST_SLOTS: usize = 1024;
/// Bytes before the parts: a counter for each slot.
const COUNTERS: usize = MOST_SLOTS * 4;
/// Blocks for each multiprocessor, at most, where keys are split.
const TURNS: usize = 2;

/// Rows of a block: 8 or 16.
fn block_rows(rows: usize) -> usize {
    if rows <= 8 { 8 } else { MOST_ROWS }
}

/// Bytes of what a block leaves for the last one.
fn part(rows: usize, dim: usize) -> usize {
    rows * (dim + 2) * 4
}

/// Bytes that any call needs.
pub(super) fn scratch(gpu: Gpu) -> usize {
    COUNTERS + TURNS * gpu.processors as usize * part(MOST_ROWS, 128)
}

/// Parts of the keys of each of `slots`, of which a multiprocessor computes one at a time.
fn splits(gpu: Gpu, slots: usize, capacity: usize, dim: usize) -> usize {
    if slots > MOST_SLOTS {
        return 1;
    }
    let processors = gpu.processors as usize;
    // A part has a tile for each warp.
    let tile = 16 * (128 / dim);
    let most = capacity.div_ceil(tile * WARPS).min(MOST_SPLITS);
    let most = most.min(TURNS * processors / slots).max(1);
    // Turns, as shares of all keys, and what the last block adds up.
    let cost = |&splits: &usize| {
        let turns = (slots * splits).div_ceil(processors);
        turns * 100_000 / splits + 12 * splits
    };
    (1..=most).min_by_key(cost).unwrap_or(1)
}

/// # Safety
/// As [`super::attention`]; heads are in tiles.
pub(super) unsafe fn launch(stream: &CudaStream, gpu: Gpu, args: &Attention) -> Result<(), Error> {
    let rows = block_rows(args.rows());
    let blocks = args.kv_heads * args.rows().div_ceil(rows);
    let splits = splits(gpu, args.batch * blocks, args.capacity, args.dim);
    let mut params = Params::new(args);
    params.counters = args.scratch;
    params.partial = args.scratch + COUNTERS as u64;
    params.splits = size(splits);
    let kernel = Module::AttentionFewRows.kernel(match rows {
        8 => args.name_of([
            "attention_few_rows_bf16_64_8",
            "attention_few_rows_bf16_128_8",
            "attention_few_rows_f16_64_8",
            "attention_few_rows_f16_128_8",
        ]),
        _ => args.name_of([
            "attention_few_rows_bf16_64_16",
            "attention_few_rows_bf16_128_16",
            "attention_few_rows_f16_64_16",
            "attention_few_rows_f16_128_16",
        ]),
    })?;
    let launch = Launch {
        grid: [size(splits), size(blocks), size(args.batch)],
        threads: size(WARPS * 32),
        // Of each warp: sums, which are four elements further apart, the largest score and the sum of weights.
        shared: size(WARPS * rows * (args.dim + 4 + 2) * 4),
        cluster: 1,
        dependent: args.dependent,
    };
    // SAFETY: the kernel takes these arguments; the caller vouches for the memory.
    unsafe { launch.run(stream, kernel, args![&params]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_fit_the_scratch_and_fill_the_device() {
        for processors in [24, 76, 132, 148] {
            let gpu = Gpu {
                capability: (9, 0),
                processors,
            };
            for slots in (1..300).chain([1000, 1024, 1025, 5000]) {
                for capacity in [1, 100, 4096, 131_072] {
                    for dim in [64, 128] {
                        let splits = splits(gpu, slots, capacity, dim);
                        assert!((1..=MOST_SPLITS).contains(&splits));
                        // A single part needs no scratch.
                        let parts = if splits > 1 { slots * splits } else { 0 };
                        let bytes = COUNTERS + parts * part(MOST_ROWS, dim);
                        assert!(bytes <= scratch(gpu), "{slots} slots, {splits} splits");
                        if capacity == 131_072 && slots * 2 <= processors as usize {
                            let busy = (slots * splits).min(processors as usize);
                            assert!(
                                busy * 5 >= processors as usize * 3,
                                "{slots} slots, {splits} splits of {processors}"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn one_sequence_of_a_llama_8b_takes_all_of_an_h200() {
        let gpu = Gpu {
            capability: (9, 0),
            processors: 132,
        };
        assert_eq!(splits(gpu, 8, 8192, 128), 16);
        assert_eq!(splits(gpu, 8 * 32, 8192, 128), 1);
    }
}
