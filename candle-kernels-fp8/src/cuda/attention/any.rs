//! Attention of any dimension and type.

use cudarc::driver::CudaStream;

use super::Attention;
use super::params::Params;
use crate::cuda::Float;
use crate::cuda::error::Error;
use crate::cuda::launch::{Launch, args};
use crate::cuda::library::Module;
use crate::cuda::rows::size;

/// Elements of a head, at most. Device twin: in `kernels/attention_any.cu`.
pub(super) const MOST_DIMS: usize = 512;

/// # Safety
/// As [`super::attention`].
pub(super) unsafe fn launch(stream: &CudaStream, args: &Attention) -> Result<(), Error> {
    let params = Params::new(args);
    let kernel = Module::AttentionAny.kernel(match args.float {
        Float::Bf16 => "attention_any_bf16",
        Float::F16 => "attention_any_f16",
        Float::F32 => "attention_any_f32",
    })?;
    let launch = Launch {
        grid: [size(args.rows()), size(args.kv_heads), size(args.batch)],
        threads: 128,
        shared: 0,
        cluster: 1,
        dependent: args.dependent,
    };
    // SAFETY: the kernel takes these arguments; the caller vouches for the memory.
    unsafe { launch.run(stream, kernel, args![&params]) }
}
