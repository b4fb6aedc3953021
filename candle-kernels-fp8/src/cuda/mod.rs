//! The kernels on NVIDIA GPUs of compute capability 8.9 and newer, with Hopper's own instructions on 9.0.
//!
//! Arguments are addresses of device memory, and nothing is allocated here. A function checks that sizes fit together,
//! chooses a kernel ([`Gpu`] says what the device can do) and launches it on a stream; errors of the kernel itself
//! surface when the stream is synchronized, as everywhere in CUDA. The device code is in `kernels/`, compiled when the
//! crate is.
//!
//! # Dependent launches
//! Kernels for one token are so short that starting them costs as much as running them. With `dependent`, a kernel is
//! launched while the one before it on the stream still runs (programmatic dependent launch, on Hopper and newer); it
//! waits for it only before it reads activations. So the caller promises that no work in flight on the stream writes
//! what the kernel reads of a weight: codes, scales, bias; nor [positions](Positions) on the device, angles, or keys
//! and values of positions before those of the call. Work before a launch that is not a dependent one is not in flight,
//! so a step starts with such a launch where the one before ended with [`argmax`], which moves positions on.

mod argmax;
mod attention;
mod cast;
mod dense_mm;
mod dequantize;
mod embed;
mod error;
mod fake_quantize;
mod gpu;
mod launch;
mod library;
mod pack;
mod pad;
pub mod probe;
mod quantize;
mod rms_norm;
mod rope_append;
mod rows;
mod scaled_mm;
mod silu_mul;
mod tensor_map;

pub use crate::float::Float;
pub use argmax::{Argmax, argmax, argmax_scratch};
pub use attention::{
    Attention, AttentionKernel, Heads, Positions, attention, attention_scratch, attention_with,
};
pub use cast::{cast_from_e4m3, cast_to_e4m3};
pub use dense_mm::{DenseMm, dense_mm, dense_mm_serves};
pub use dequantize::{Dequantize, dequantize};
pub use embed::{Embed, embed};
pub use error::Error;
pub use fake_quantize::{FakeQuantize, fake_quantize};
pub use gpu::Gpu;
pub use pack::{Panels, pack, unpack};
pub use pad::{pad_rows, padded};
pub use quantize::{Quantize, QuantizeTensor, TENSOR_SCRATCH, quantize, quantize_tensor};
pub use rms_norm::{Residual, RmsNorm, rms_norm};
pub use rope_append::{HeadNorms, RopeAppend, rope_append};
pub use rows::{Output, Quantization};
pub use scaled_mm::{
    Accumulation, Activations, Kernel, ScaledMm, Scaling, WeightLayout, scaled_mm, scaled_mm_with,
};
pub use silu_mul::{SiluMul, silu_mul};

/// An address of device memory.
pub type Address = cudarc::driver::sys::CUdeviceptr;
