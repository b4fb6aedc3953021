//! Rows of a table, by ids: what a token is when it enters a model.
//!
//! Ids are in device memory, and read when the kernel runs, so that a captured graph serves one token after the other.
//!
//! Floor: a row in and out for each id.

use cudarc::driver::CudaStream;

use super::error::Error;
use super::launch::{Launch, args};
use super::library::Module;
use super::rows::size;
use super::{Address, Float, Gpu};

/// The rows of a table `[vocab, dim]` that ids name.
///
/// For an id that the table has no row for, nothing outside is read: its row becomes NaN, which reaches every logit of
/// its sequence, and `unknown` becomes 1. So the host learns of it by one word that it copies together with the
/// generated ids, and that it clears itself.
#[derive(Debug, Clone, Copy)]
pub struct Embed {
    /// Ids.
    pub n: usize,
    /// Rows of the table.
    pub vocab: usize,
    /// Elements of a row.
    pub dim: usize,
    /// `[vocab, dim]`.
    pub table: Address,
    /// Type of the table.
    pub float: Float,
    /// U32 `[n]`.
    pub ids: Address,
    /// Receives the rows, `[n, dim]`.
    pub out: Address,
    /// Type of `out`: values of another type are rounded to it.
    pub out_float: Float,
    /// U32, which becomes 1 if an id is `vocab` or more, and is left alone otherwise.
    pub unknown: Option<Address>,
    /// Whether the launch may overlap the kernel before it: see [dependent launches](super#dependent-launches).
    pub dependent: bool,
}

/// Device twin: `Embed` in `kernels/embed.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Params {
    table: Address,
    ids: Address,
    out: Address,
    unknown: Address,
    vocab: u32,
    dim: u32,
    blocks: u32,
    aligned: u32,
    out_float: Float,
}

/// Elements that a thread handles, and threads of a block. Device twins: in `kernels/embed.cu`.
const PIECE: usize = 8;
const THREADS: usize = 256;

/// Looks rows up.
///
/// # Errors
/// If the device has no FP8 units or the driver refuses the launch.
///
/// # Panics
/// If `vocab` or `dim` is 0, or sizes do not fit 31 bits.
///
/// # Safety
/// The addresses are of memory of the stream's device, as large as the sizes say, aligned to their elements, and valid
/// until the stream has passed the launch; what is written overlaps nothing that is read; and what
/// [dependent launches](super#dependent-launches) ask for holds of the table.
pub unsafe fn embed(stream: &CudaStream, args: &Embed) -> Result<(), Error> {
    Gpu::of(stream)?;
    assert!(args.vocab > 0 && args.dim > 0, "a table has rows");
    let aligned = args.dim.is_multiple_of(PIECE)
        && [args.table, args.out]
            .iter()
            .all(|address| address.is_multiple_of(16));
    let blocks = args.dim.div_ceil(THREADS * PIECE);
    let params = Params {
        table: args.table,
        ids: args.ids,
        out: args.out,
        unknown: args.unknown.unwrap_or(0),
        vocab: size(args.vocab),
        dim: size(args.dim),
        blocks: size(blocks),
        aligned: u32::from(aligned),
        out_float: args.out_float,
    };
    let launch = Launch {
        grid: [size(args.n * blocks), 1, 1],
        threads: size(THREADS),
        shared: 0,
        cluster: 1,
        dependent: args.dependent,
    };
    let kernel = Module::Embed.kernel(match args.float {
        Float::Bf16 => "embed_bf16",
        Float::F16 => "embed_f16",
        Float::F32 => "embed_f32",
    })?;
    // SAFETY: the kernel takes these arguments; the caller vouches for the memory.
    unsafe { launch.run(stream, kernel, args![&params]) }
}
