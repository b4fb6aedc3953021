//! Products on Hopper's warpgroup instructions, with operands that the bulk copy engine brings.

mod large;
mod skinny;
mod small;
mod values;
mod values_small;

use cudarc::driver::sys;
use std::ffi::c_void;

use super::{Activations, ScaledMm, in_parts, row_wise};
use crate::ScaleLayout;
use crate::cuda::error::{Error, check};
use crate::cuda::{Address, Float};
pub(super) use large::Sm90Large;
pub(super) use large::launch as launch_large;
pub(super) use skinny::Sm90Skinny;
pub(super) use skinny::launch as launch_skinny;
pub(super) use small::Sm90Small;
pub(super) use small::launch as launch_small;
pub(super) use values::launch as launch_values;
pub(super) use values::{Sm90Values, Widening};
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
    in_parts(args)
        && args.k.is_multiple_of(16)
        && matches!(args.activations, Activations::Codes { .. })
}

/// Codes `[rows, k]`, or any bytes, as the copy engine sees them, in tiles of `tile_rows` rows.
fn tensor_map(
    codes: Address,
    (rows, k): (usize, usize),
    stride: usize,
    tile_rows: u32,
) -> Result<sys::CUtensorMap, Error> {
    // SAFETY: zeros are a valid value of this plain C struct.
    let mut map: sys::CUtensorMap = unsafe { std::mem::zeroed() };
    let dims = [k as u64, rows as u64];
    let strides = [stride as u64];
    let tile = [DEPTH as u32, tile_rows];
    // SAFETY: the arrays are as long as the rank of 2 asks for; the address is not read here.
    check(unsafe {
        sys::cuTensorMapEncodeTiled(
            &mut map,
            sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT8,
            2,
            codes as *mut c_void,
            dims.as_ptr(),
            strides.as_ptr(),
            tile.as_ptr(),
            [1u32, 1].as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    })?;
    Ok(map)
}

/// The maps of activations and weight.
fn tensor_maps(
    args: &ScaledMm,
    x_rows: u32,
    weight_rows: u32,
) -> Result<[sys::CUtensorMap; 2], Error> {
    let Activations::Codes { codes, .. } = args.activations else {
        unreachable!("tiles hold codes");
    };
    let &ScaledMm { m, n, k, .. } = args;
    Ok([
        tensor_map(codes, (m, k), args.row_stride, x_rows)?,
        tensor_map(args.weight, (n, k), args.weight_stride, weight_rows)?,
    ])
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
    let &ScaledMm { m, n, k, .. } = args;
    let size = float.size();
    Ok([
        tensor_map(values, (m, k * size), args.row_stride * size, x_rows)?,
        tensor_map(args.weight, (n, k), args.weight_stride, weight_rows)?,
    ])
}
