//! The kernels on the CPU, threaded with rayon over output features or rows.
//!
//! `generic.rs` holds the inner loops, the only code here that a processor's vector instructions would change: decode a
//! run of codes, and take dot products. Versions of it for one instruction set belong beside it, and the choice among
//! them here, once for a process.

mod dequantize;
mod generic;
mod quantize;
mod quantize_weight;
mod scaled_mm;

pub use dequantize::{Element, dequantize};
pub use quantize::{fake_quantize, quantize_groups, quantize_static, quantize_tensor};
pub use quantize_weight::{quantize_weight, weight_amax};
pub use scaled_mm::{Activations, ScaledMm, Scaling, scaled_mm};

/// Elements that one task should at least have: handing a task to another thread costs some microseconds.
const TASK: usize = 1 << 16;

/// The number of rows of `k` elements that make up a task.
fn rows_per_task(k: usize) -> usize {
    (TASK / k.max(1)).max(1)
}
