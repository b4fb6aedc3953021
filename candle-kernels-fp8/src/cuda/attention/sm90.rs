//! Attention of many queries on Hopper's warpgroup instructions, with operands that the bulk copy engine brings.

use cudarc::driver::{CudaStream, sys};

use super::params::Params;
use super::{Attention, Heads, Positions};
use crate::cuda::error::Error;
use crate::cuda::launch::{Launch, args};
use crate::cuda::library::Module;
use crate::cuda::rows::size;
use crate::cuda::tensor_map::Map;
use crate::cuda::{Address, Gpu};

/// Rows of a tile, and keys of one. Device twins of all of these: in `kernels/sm90_attention.cu`.
const ROWS: usize = 128;
const KEYS: usize = 128;
/// Elements of a row of a tile: 128 bytes.
const COLS: usize = 64;

/// Whether positions and heads are as the copy engine takes them. What is behind the last key counts as zero only where
/// the engine knows that it is the last one, and tiles are of whole tokens.
pub(super) fn serves(args: &Attention) -> bool {
    matches!(args.positions, Positions::Known(_)) && args.group() <= ROWS
}

/// Bytes of shared memory, as device code lays it out, and what aligning it may cost.
fn shared(dim: usize) -> usize {
    let stages = if dim == 64 { 4 } else { 2 };
    let tiles = (ROWS + 2 * stages * KEYS) * dim * 2;
    let results = ROWS * dim * 2;
    (tiles + results + (1 + 2 * stages) * 16).next_multiple_of(1024) + 1024
}

/// A tensor of 16-bit elements, sizes from the innermost dimension on.
fn map(
    address: Address,
    sizes: [usize; 4],
    strides: [usize; 3],
    tile: [usize; 4],
) -> Result<sys::CUtensorMap, Error> {
    Map {
        elements: sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT16,
        address,
        sizes: &sizes.map(|size| size as u64),
        strides: &strides.map(|stride| stride as u64 * 2),
        tile: &tile.map(|size| size as u32),
        swizzle: sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
    }
    .encode()
}

/// The map of keys or values, of as many as there are.
fn heads_map(args: &Attention, heads: Heads, keys: usize) -> Result<sys::CUtensorMap, Error> {
    map(
        heads.values,
        [args.dim, keys, args.kv_heads, args.batch],
        [args.dim, heads.head_stride, heads.batch_stride],
        [COLS, KEYS, 1, 1],
    )
}

/// # Safety
/// As [`super::attention`]; heads are in tiles, and the device is of compute capability 9.0.
pub(super) unsafe fn launch(stream: &CudaStream, gpu: Gpu, args: &Attention) -> Result<(), Error> {
    let params = Params::new(args);
    let Positions::Known(position) = args.positions else {
        unreachable!("the kernel serves known positions");
    };
    let (group, keys) = (args.group(), position + args.queries);
    let queries = ROWS / group;
    let q = map(
        args.q,
        [args.dim, args.heads, args.queries, args.batch],
        [args.dim, args.q_stride, args.queries * args.q_stride],
        [COLS, group, queries, 1],
    )?;
    let k = heads_map(args, args.keys, keys)?;
    let v = heads_map(args, args.values, keys)?;
    let kernel = Module::Sm90Attention.kernel(args.name_of([
        "attention_sm90_bf16_64",
        "attention_sm90_bf16_128",
        "attention_sm90_f16_64",
        "attention_sm90_f16_128",
    ]))?;
    let tiles = size(args.queries.div_ceil(queries) * args.kv_heads * args.batch);
    let launch = Launch {
        grid: [tiles.min(gpu.processors), 1, 1],
        // A warpgroup for each 64 rows, and one that copies.
        threads: 3 * 128,
        shared: size(shared(args.dim)),
        cluster: 1,
        dependent: args.dependent,
    };
    // SAFETY: the kernel takes these arguments; the caller vouches for the memory.
    unsafe { launch.run(stream, kernel, args![&params, &q, &k, &v]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_fit_what_a_block_has() {
        for dim in [64, 128] {
            assert!(shared(dim) <= 227 * 1024, "{dim}: {}", shared(dim));
        }
    }
}
