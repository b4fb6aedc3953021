//! Few rows of activations times a weight in half precision, as `lm_head` mostly is.
//!
//! Floor: the weight once. That of a Llama 8B, 128256 × 4096 in BF16, is 1.05 GB: 228 µs at 4.6 TB/s.

use cudarc::driver::sys::CUdevice_attribute_enum as Attribute;
use cudarc::driver::{CudaStream, DriverError};

use super::error::Error;
use super::launch::{Launch, args};
use super::library::Module;
use super::rows::size;
use super::{Address, Float, Gpu};

/// A product of activations `[m, k]` with the transpose of a weight `[n, k]`, plus a bias, added up in f32.
///
/// The order of the sum depends on `k` alone: a row's results are the same, to the bit, whatever m and n are, and on
/// every device of an architecture.
#[derive(Debug, Clone, Copy)]
pub struct DenseMm {
    /// Rows of activations, at most 16.
    pub m: usize,
    /// Output features.
    pub n: usize,
    /// Input features, a multiple of 8.
    pub k: usize,
    /// `[m, k]`, a multiple of 16.
    pub x: Address,
    /// Elements from one row of `x` to the next, a multiple of 8.
    pub row_stride: usize,
    /// `[n, k]`, a multiple of 16.
    pub weight: Address,
    /// Elements from one row of the weight to the next, a multiple of 8.
    pub weight_stride: usize,
    /// Type of `x` and the weight: BF16 or F16.
    pub float: Float,
    /// `[n]`, with its type.
    pub bias: Option<(Address, Float)>,
    /// Receives `[m, n]`, dense.
    pub out: Address,
    /// Type of `out`.
    pub out_float: Float,
    /// Whether the launch may overlap the kernel before it: see [dependent launches](super#dependent-launches).
    pub dependent: bool,
}

/// Device twin: `DenseMm` in `kernels/dense_mm.cu`, which says what the fields mean.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Params {
    x: Address,
    weight: Address,
    bias: Address,
    out: Address,
    x_stride: u64,
    weight_stride: u64,
    m: u32,
    n: u32,
    k: u32,
    bias_float: Float,
    out_float: Float,
}

/// Rows of activations, at most.
const MOST: usize = 16;

/// Device twins: in `kernels/dense_mm.cu`.
const WARPS: usize = 4;
const ROWS: usize = 32;
const CHUNK_BYTES: usize = 128;
const DEPTH: usize = 4;

/// Blocks of a multiprocessor, at most: one multiplies while the other adds up and stores.
const MOST_BLOCKS: usize = 2;
/// Shared memory of a block that the system takes.
const RESERVED: usize = 1024;

/// Bytes of shared memory for so many tokens: a ring of chunks for each warp, and sums of two tiles.
fn shared(tokens: usize) -> usize {
    WARPS * (DEPTH * ROWS * CHUNK_BYTES + 2 * tokens * (ROWS + 4) * 4)
}

/// Whether [`dense_mm`] takes these sizes, types and addresses. What it does not take is for a library of matrix
/// products.
pub fn dense_mm_serves(args: &DenseMm) -> bool {
    let multiples = [args.k, args.row_stride, args.weight_stride];
    args.m <= MOST
        && args.k > 0
        && args.float != Float::F32
        && multiples.iter().all(|count| count.is_multiple_of(8))
        && [args.x, args.weight]
            .iter()
            .all(|address| address.is_multiple_of(16))
}

/// Computes a product.
///
/// # Errors
/// If the device has no FP8 units or the driver refuses the launch.
///
/// # Panics
/// If [`dense_mm_serves`] says no, a stride is below `k`, or sizes do not fit 31 bits.
///
/// # Safety
/// The addresses are of memory of the stream's device, as large as the sizes say, aligned to their elements, and valid
/// until the stream has passed the launch; `out` overlaps nothing that is read; and what
/// [dependent launches](super#dependent-launches) ask for holds.
pub unsafe fn dense_mm(stream: &CudaStream, args: &DenseMm) -> Result<(), Error> {
    let gpu = Gpu::of(stream)?;
    assert!(dense_mm_serves(args), "{args:?} is not served");
    assert!(
        args.row_stride >= args.k && args.weight_stride >= args.k,
        "rows of {} fit their strides",
        args.k
    );
    if args.m == 0 {
        return Ok(());
    }
    let tokens = args.m.next_multiple_of(8);
    let tiles = args.n.div_ceil(ROWS);
    let (side_by_side, shared) = residency(shared_of_a_processor(stream)?, shared(tokens));
    let blocks = gpu.processors as usize * side_by_side;
    let (bias, bias_float) = args.bias.unwrap_or((0, Float::F32));
    let params = Params {
        x: args.x,
        weight: args.weight,
        bias,
        out: args.out,
        x_stride: args.row_stride as u64,
        weight_stride: args.weight_stride as u64,
        m: size(args.m),
        n: size(args.n),
        k: size(args.k),
        bias_float,
        out_float: args.out_float,
    };
    let launch = Launch {
        grid: [size(tiles.min(blocks)), 1, 1],
        threads: size(WARPS * 32),
        shared: size(shared),
        cluster: 1,
        dependent: args.dependent,
    };
    let kernel = Module::DenseMm.kernel(match (args.float, tokens) {
        (Float::Bf16, 8) => "dense_mm_bf16_8",
        (Float::Bf16, _) => "dense_mm_bf16_16",
        (_, 8) => "dense_mm_f16_8",
        (_, _) => "dense_mm_f16_16",
    })?;
    // SAFETY: the kernel takes these arguments; the caller vouches for the memory.
    unsafe { launch.run(stream, kernel, args![&params]) }
}

/// Blocks that a multiprocessor runs side by side, and bytes of shared memory to ask for, of those that it has and those
/// that a block needs: so many that not one more fits. A dependent launch finds multiprocessors that the kernel before
/// it leaves one after the other; the first ones would take more than their part of the blocks, which stay.
fn residency(of_a_processor: usize, needed: usize) -> (usize, usize) {
    let blocks = (of_a_processor / (needed + RESERVED)).clamp(1, MOST_BLOCKS);
    let too_many = (of_a_processor / (blocks + 1) + 16).next_multiple_of(16) - RESERVED;
    (blocks, needed.max(too_many))
}

fn shared_of_a_processor(stream: &CudaStream) -> Result<usize, DriverError> {
    let bytes = stream
        .context()
        .attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)?;
    Ok(bytes as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_fit_every_card() {
        // As device code computes them: a ring of 16-byte pieces, and sums.
        assert_eq!(shared(8), 4 * 4 * 4 * 2 * 32 * 16 + 2 * 4 * 8 * 36 * 4);
        assert_eq!(shared(16), 4 * 4 * 4 * 2 * 32 * 16 + 2 * 4 * 16 * 36 * 4);
        // Ada and the small Blackwells have 99 KiB for a block; Hopper 228 KiB for two.
        assert!(shared(16) <= 99 * 1024);
        assert!(2 * (shared(16) + RESERVED) <= 228 * 1024);
    }

    #[test]
    fn so_many_blocks_fit_and_no_more() {
        for (of_a_processor, of_a_block, expected) in [(100, 99, 1), (164, 163, 1), (228, 227, 2)] {
            for tokens in [8, 16] {
                let (blocks, asked) = residency(of_a_processor * 1024, shared(tokens));
                let expected = match (of_a_processor, tokens) {
                    (164, 8) => 2,
                    _ => expected,
                };
                assert_eq!(blocks, expected, "{of_a_processor} {tokens}");
                assert!(asked >= shared(tokens) && asked <= of_a_block * 1024);
                assert!(blocks * (asked + RESERVED) <= of_a_processor * 1024);
                assert!((blocks + 1) * (asked + RESERVED) > of_a_processor * 1024);
            }
        }
    }
}
