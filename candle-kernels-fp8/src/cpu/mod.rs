//! The kernels on the CPU, threaded with rayon over output features or rows.
//!
//! Inner loops that decide the speed are written for each instruction set ([`InstructionSet`]): `generic.rs`,
//! `x86_64/`, `aarch64/` have the same functions, and [`InstructionSet::best`] picks one while the program runs. All
//! other loops are portable Rust, compiled once for each instruction set.

#[cfg(target_arch = "aarch64")]
mod aarch64;
mod aligned;
mod attention;
mod dense_mm;
mod dequantize;
mod element;
mod exp;
mod fill;
mod generic;
mod isa;
mod lanes;
mod matmul;
pub mod probe;
mod quantize;
mod quantize_weight;
mod rms_norm;
mod rope;
mod scaled_mm;
mod silu_mul;
#[cfg(test)]
mod testing;
#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(target_arch = "aarch64")]
pub use aarch64::Neon;
pub use attention::{Attention, Heads, attention};
pub use dense_mm::dense_mm;
pub use dequantize::dequantize;
pub use element::Element;
pub use generic::Generic;
pub use isa::InstructionSet;
pub use matmul::in_pool;
pub use quantize::{fake_quantize, quantize_groups, quantize_static, quantize_tensor};
pub use quantize_weight::{quantize_weight, weight_amax};
pub use rms_norm::{add_rms_norm, rms_norm};
pub use rope::rope;
pub use scaled_mm::{Activations, ScaledMm, Scaling, Weight, scaled_mm};
pub use silu_mul::silu_mul;
#[cfg(target_arch = "x86_64")]
pub use x86_64::{Avx2, Avx512};

/// Elements that one task should at least have: handing a task to another thread costs some microseconds.
const TASK: usize = 1 << 16;

/// The number of rows of `k` elements that make up a task.
fn rows_per_task(k: usize) -> usize {
    (TASK / k.max(1)).max(1)
}
