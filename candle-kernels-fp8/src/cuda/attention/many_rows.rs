//! Attention of many queries, on the tensor core instructions that every card since Ada has.

use cudarc::driver::CudaStream;

use super::Attention;
use super::params::Params;
use crate::cuda::error::Error;
use crate::cuda::launch::{Launch, args};
use crate::cuda::library::Module;
use crate::cuda::rows::size;

/// Rows of a block, and keys of a tile, of which there are two. Device twins: in `kernels/attention_many_rows.cu`.
const ROWS: usize = 128;
const KEYS: usize = 64;

/// # Safety
/// As [`super::attention`]; heads are in tiles.
pub(super) unsafe fn launch(stream: &CudaStream, args: &Attention) -> Result<(), Error> {
    let params = Params::new(args);
    let kernel = Module::AttentionManyRows.kernel(args.name_of([
        "attention_many_rows_bf16_64",
        "attention_many_rows_bf16_128",
        "attention_many_rows_f16_64",
        "attention_many_rows_f16_128",
    ]))?;
    let launch = Launch {
        grid: [
            size(args.kv_heads * args.batch),
            size(args.rows().div_ceil(ROWS)),
            1,
        ],
        threads: 128,
        shared: size((ROWS + 2 * 2 * KEYS) * args.dim * 2),
        cluster: 1,
        dependent: args.dependent,
    };
    // SAFETY: the kernel takes these arguments; the caller vouches for the memory.
    unsafe { launch.run(stream, kernel, args![&params]) }
}
