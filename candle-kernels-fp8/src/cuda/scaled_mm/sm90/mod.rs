//! Products on Hopper's warpgroup instructions, with operands that the bulk copy engine brings.

mod large;
mod skinny;
mod small;
mod values;
mod values_small;

use cudarc::driver::sys;

use super::{Activations, ScaledMm, WeightLayout, in_parts, row_wise};
use crate::ScaleLayout;
use crate::cuda::error::Error;
use crate::cuda::tensor_map::Map;
use crate::cuda::{Address, Float, Panels};
pub(super) use large::Sm90Large;
pub(super) use large::launch as launch_large;
pub(super) use skinny::launch as launch_skinny;
pub(super) use skinny::{Copies, Sm90Skinny};
pub(super) use small::Sm90Small;
pub(super) use small::launch as launch_small;
pub(super) use values::Sm90Values;
pub(super) use values::launch as launch_values;
pub(super) use values_small::Sm90ValuesSmall;
pub(super) use values_small::launch as launch_values_small;

/// Codes of a row that a tile holds, as device code says (`DEPTH`).
pub(super) const DEPTH: usize = 128;

/// Shared memory that a block can have, in bytes.
const SHARED: u32 = 227 * 1024;

/// Tiles start at multiples of this, in bytes; dynamic shared memory need not.
const ALIGNED: u32 = 1024;

/// Whether the scales are of layouts that tiles of 128 features can take: the codes of a tile and a part of K share one.
fn in_tiles(args: &ScaledMm) -> bool {
    let features = match args.layout {
        ScaleLayout::Tensor => true,
        ScaleLayout::Channel => row_wise(args),
        ScaleLayout::Block { rows, .. } => rows >= args.n || rows.is_multiple_of(128),
    };
    features && in_boxes(args)
}

/// Whether the copy engine can bring the operands, and scales change where a tile's part of K ends.
fn in_boxes(args: &ScaledMm) -> bool {
    in_parts(args) && matches!(args.activations, Activations::Codes { .. })
}

/// Codes `[rows, k]`, or any bytes, row-major, in tiles of 128 bytes of `tile_rows` rows.
fn rows_map(
    codes: Address,
    (rows, k): (usize, usize),
    stride: usize,
    tile_rows: u32,
) -> Result<sys::CUtensorMap, Error> {
    let map = Map {
        elements: sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT8,
        address: codes,
        sizes: &[k as u64, rows as u64],
        strides: &[stride as u64],
        tile: &[DEPTH as u32, tile_rows],
        swizzle: sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
    };
    map.encode()
}

/// The map of the activations, in tiles of `rows` rows.
fn x_map(args: &ScaledMm, rows: u32) -> Result<sys::CUtensorMap, Error> {
    let Activations::Codes { codes, .. } = args.activations else {
        unreachable!("tiles hold codes");
    };
    rows_map(codes, (args.m, args.k), args.row_stride, rows)
}

/// As [`x_map`], of rows of whole tiles: a copy brings `boxes` neighbouring tiles, one after the other.
fn x_boxes_map(args: &ScaledMm, rows: u32, boxes: u32) -> Result<sys::CUtensorMap, Error> {
    let Activations::Codes { codes, .. } = args.activations else {
        unreachable!("tiles hold codes");
    };
    assert!(
        args.k.is_multiple_of(DEPTH),
        "no tile goes on into the next row"
    );
    let map = Map {
        elements: sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT8,
        address: codes,
        sizes: &[DEPTH as u64, args.m as u64, (args.k / DEPTH) as u64],
        strides: &[args.row_stride as u64, DEPTH as u64],
        tile: &[DEPTH as u32, rows, boxes],
        swizzle: sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
    };
    map.encode()
}

/// The map of the weight, in tiles of `rows` rows, a multiple of 8; in panels they are `atoms` times 128 codes deep.
fn weight_map(args: &ScaledMm, rows: u32, atoms: u32) -> Result<sys::CUtensorMap, Error> {
    let &ScaledMm { weight, n, k, .. } = args;
    if let WeightLayout::Rows { stride } = args.weight_layout {
        return rows_map(weight, (n, k), stride, rows);
    }
    // An atom is 128 elements of 8 bytes: a tile has at most 256 elements along a dimension. It is swizzled already.
    let panel = 8 * Panels { n, k }.row_len() as u64;
    let map = Map {
        elements: sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT64,
        address: weight,
        sizes: &[128, k.div_ceil(DEPTH) as u64, n.div_ceil(8) as u64],
        strides: &[1024, panel],
        tile: &[128, atoms, rows / 8],
        swizzle: sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
    };
    map.encode()
}

/// Whether the kernels for values take a product: BF16 or F16, and scales that 64 features of a tile and a part of K share
/// or that are constant along K. The copy engine fills up what K lacks of a whole part.
fn in_values(args: &ScaledMm) -> bool {
    let half = matches!(args.activations, Activations::Values { float, .. } if float != Float::F32);
    let shared = match args.layout {
        ScaleLayout::Block { rows, .. } => rows >= args.n || rows.is_multiple_of(64),
        _ => true,
    };
    half && in_parts(args) && (row_wise(args) || shared)
}

/// The maps of activations of 16 bits, in tiles of 128 bytes, and of the weight.
fn values_maps(
    args: &ScaledMm,
    x_rows: u32,
    weight_rows: u32,
) -> Result<[sys::CUtensorMap; 2], Error> {
    let Activations::Values { values, float } = args.activations else {
        unreachable!("tiles hold values");
    };
    let (m, k, size) = (args.m, args.k, float.size());
    let x = rows_map(values, (m, k * size), args.row_stride * size, x_rows)?;
    Ok([x, weight_map(args, weight_rows, 1)?])
}
