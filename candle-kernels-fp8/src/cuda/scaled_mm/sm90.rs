//! Products on Hopper's warpgroup instructions, with operands that the bulk copy engine brings.

use cudarc::driver::{CudaStream, sys};
use std::ffi::c_void;

use super::params::Params;
use super::{Accumulation, Activations, ScaledMm, in_parts, row_wise};
use crate::ScaleLayout;
use crate::cuda::error::{Error, check};
use crate::cuda::launch::{Launch, args};
use crate::cuda::library::Module;
use crate::cuda::{Address, Gpu};

/// Codes of a row that a tile holds, as device code says (`DEPTH`).
pub(super) const DEPTH: usize = 128;

/// A block's tile of a product with few rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Sm90Small {
    /// Tokens of a block: 16, 32, 64 or 128.
    pub(super) tokens: u32,
    /// Blocks that share out K: at most 8.
    pub(super) blocks: u32,
}

/// A block's tile of a product with many rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Sm90Large {
    /// Output features of a block: 64, 96 or 128.
    pub(super) features: u32,
}

/// Whether the scales are of layouts that tiles of 128 features can take: the codes of a tile and a part of K share one.
fn in_tiles(args: &ScaledMm) -> bool {
    let features = match args.layout {
        ScaleLayout::Tensor => true,
        ScaleLayout::Channel => row_wise(args),
        ScaleLayout::Block { rows, .. } => rows >= args.n || rows.is_multiple_of(128),
    };
    features
        && in_parts(args)
        && args.k.is_multiple_of(16)
        && matches!(args.activations, Activations::Codes { .. })
}

impl Sm90Small {
    /// Output features of a block.
    pub(super) const FEATURES: usize = 128;

    pub(super) fn all() -> Vec<Self> {
        let with = |tokens| (1..=8).map(move |blocks| Self { tokens, blocks });
        [16, 32, 64, 128].into_iter().flat_map(with).collect()
    }

    pub(super) fn serves(self, args: &ScaledMm) -> bool {
        in_tiles(args) && self.blocks as usize <= args.k.div_ceil(DEPTH)
    }

    /// Stages of the ring of tiles, as device code says.
    fn stages(self) -> u32 {
        match self.tokens {
            ..=32 => 5,
            64 => 4,
            _ => 6,
        }
    }

    /// Bytes of shared memory, as device code lays it out, and what aligning it may cost.
    fn shared(self) -> u32 {
        let ring = self.stages() * (128 + self.tokens) * 128;
        let sums = self.tokens * (128 + 4) * 4;
        let scales = self.stages() * self.tokens * 4;
        (ring.max(sums) + scales + self.stages() * 16).next_multiple_of(1024) + 1024
    }

    fn kernel(self, args: &ScaledMm) -> &'static str {
        match (self.tokens, row_wise(args)) {
            (16, true) => "scaled_mm_sm90_small_16",
            (16, false) => "scaled_mm_sm90_small_16_block",
            (32, true) => "scaled_mm_sm90_small_32",
            (32, false) => "scaled_mm_sm90_small_32_block",
            (64, true) => "scaled_mm_sm90_small_64",
            (64, false) => "scaled_mm_sm90_small_64_block",
            (_, true) => "scaled_mm_sm90_small_128",
            (_, false) => "scaled_mm_sm90_small_128_block",
        }
    }
}

impl Sm90Large {
    /// Tokens of a block.
    pub(super) const TOKENS: usize = 256;

    pub(super) fn all() -> Vec<Self> {
        [64, 96, 128].map(|features| Self { features }).into()
    }

    pub(super) fn serves(self, args: &ScaledMm) -> bool {
        in_tiles(args)
            && (self.features != 96
                || row_wise(args) && args.accumulation == Accumulation::Promoted)
    }

    /// Bytes of shared memory, as device code lays it out, and what aligning it may cost.
    fn shared(self) -> u32 {
        let ring = 4 * (256 + self.features) * 128;
        let results = 8 * 16 * (self.features / 2 + 8) * 2;
        let scales = 4 * self.features * 4;
        (ring + results + scales + 4 * 16).next_multiple_of(1024) + 1024
    }

    fn kernel(self, args: &ScaledMm) -> &'static str {
        match (self.features, row_wise(args), args.accumulation) {
            (64, false, _) => "scaled_mm_sm90_large_64_block",
            (_, false, _) => "scaled_mm_sm90_large_128_block",
            (64, true, Accumulation::Promoted) => "scaled_mm_sm90_large_64",
            (64, true, Accumulation::Fast) => "scaled_mm_sm90_large_64_fast",
            (96, true, _) => "scaled_mm_sm90_large_96",
            (_, true, Accumulation::Promoted) => "scaled_mm_sm90_large_128",
            (_, true, Accumulation::Fast) => "scaled_mm_sm90_large_128_fast",
        }
    }
}

/// Codes `[rows, k]` as the copy engine sees them, in tiles of `tile_rows` rows.
fn tensor_map(
    codes: Address,
    rows: usize,
    k: usize,
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
        tensor_map(codes, m, k, args.row_stride, x_rows)?,
        tensor_map(args.weight, n, k, args.weight_stride, weight_rows)?,
    ])
}

/// # Safety
/// As [`super::scaled_mm`]; the device is of compute capability 9.0.
pub(super) unsafe fn launch_small(
    stream: &CudaStream,
    args: &ScaledMm,
    config: Sm90Small,
) -> Result<(), Error> {
    let params = Params::new(args);
    let [x, weight] = tensor_maps(args, config.tokens, Sm90Small::FEATURES as u32)?;
    let kernel = Module::Sm90ScaledMmSmall.kernel(config.kernel(args))?;
    let tiles = params.n.div_ceil(Sm90Small::FEATURES as u32) * params.m.div_ceil(config.tokens);
    let launch = Launch {
        grid: [tiles * config.blocks, 1, 1],
        threads: 288,
        shared: config.shared(),
        cluster: config.blocks,
        dependent: args.dependent,
    };
    // SAFETY: the kernel takes these arguments; the caller vouches for the memory.
    unsafe { launch.run(stream, kernel, args![&params, &x, &weight, &config.blocks]) }
}

/// # Safety
/// As [`super::scaled_mm`]; the device is of compute capability 9.0.
pub(super) unsafe fn launch_large(
    stream: &CudaStream,
    gpu: Gpu,
    args: &ScaledMm,
    config: Sm90Large,
) -> Result<(), Error> {
    let params = Params::new(args);
    // Each of a pair of blocks copies half of the activations that both use.
    let [x, weight] = tensor_maps(args, Sm90Large::TOKENS as u32 / 2, config.features)?;
    let kernel = Module::Sm90ScaledMmLarge.kernel(config.kernel(args))?;
    let pairs =
        params.m.div_ceil(Sm90Large::TOKENS as u32) * params.n.div_ceil(2 * config.features);
    let launch = Launch {
        grid: [2 * pairs.min(gpu.processors / 2), 1, 1],
        threads: 384,
        shared: config.shared(),
        cluster: 2,
        dependent: args.dependent,
    };
    // SAFETY: the kernel takes these arguments; the caller vouches for the memory.
    unsafe { launch.run(stream, kernel, args![&params, &x, &weight]) }
}
