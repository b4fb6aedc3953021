//! FP8 tensor operations for Candle: quantizers, scaled matrix products, dequantization.
//!
//! Weights are `F8E4M3` tensors `[N, K]` (`[out, in]`) with f32 scales; activations are BF16, F16 or F32 tensors
//! `[.., K]`. [`scaled_mm`] multiplies the two without ever expanding the weight; how the activations enter is an
//! [`Input`], how the scales lie a [`ScaleLayout`].
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use candle_fp8::{Input, Quantization, Rounding, ScaleLayout};
//!
//! # fn main() -> candle_core::Result<()> {
//! let device = Device::Cpu;
//! let weight = Tensor::randn(0f32, 1., (8, 32), &device)?; // [N, K]
//! let x = Tensor::randn(0f32, 1., (2, 3, 32), &device)?; // [.., K]
//!
//! // To FP8: one scale for each output feature.
//! let layout = ScaleLayout::Channel;
//! let scale = candle_fp8::weight_scale(&weight, layout, DType::F32)?; // F32 [8, 1]
//! let codes = candle_fp8::quantize_weight(&weight, &scale, layout, Rounding::Once)?; // F8E4M3 [8, 32]
//!
//! // W8A8: activations are quantized on the way in, one scale for each row.
//! let input = Input::Quantize(&x, Quantization::PerToken);
//! let y = candle_fp8::scaled_mm(input, &codes, &scale, layout, None)?; // F32 [2, 3, 8]
//!
//! // W8A16: activations stay as they are.
//! let z = candle_fp8::scaled_mm(Input::Full(&x), &codes, &scale, layout, None)?;
//!
//! let exact = x.broadcast_matmul(&weight.t()?)?;
//! for (result, bound) in [(y, 2.0), (z, 1.5)] {
//!     let error = (result - &exact)?.abs()?.max_all()?.to_scalar::<f32>()?;
//!     assert!(error < bound, "{error}");
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # Arithmetic
//! One definition on every device, all in f32:
//! - a scale is `amax / 448`; 1/448 where `amax` is 0; never below the smallest normal f32;
//! - a code is `x / scale` rounded to nearest, ties to even, and clamped to ±448; NaN stays NaN;
//! - a product is the f32 sum of code products over each run of K on which no scale changes, times the product of the
//!   two scales; the runs and the bias are added in f32, and the result is cast to the input's dtype once.
//!
//! # Devices
//! - The CPU.
//! - NVIDIA GPUs of compute capability 8.9 and newer (Ada, Hopper, Blackwell), with the feature `cuda`; Hopper has
//!   kernels of its own. Codes, scales and everything elementwise are those of the CPU, bit by bit, but for the sign of
//!   NaN. Sums are not: tensor cores keep 13 to 14 bits of a sum of products of codes, over 128 of them at most, and what
//!   they give is added in f32.
//! - GPUs of Apple silicon (M1 and newer), with the feature `metal`. Codes, scales and everything elementwise are those
//!   of the CPU, bit by bit, but for NaN's sign and for results below the smallest normal f32, which may be zero; sums
//!   are added in f32. The numbers are checked by emulation, not yet on such a GPU.
//!
//! [`fp8_kernels`] says whether a device is one of them. Elsewhere each op on FP8 answers with an error that says so, and
//! nothing falls back silently; [`dequantize_bytes`], [`weight_scale`] and [`quantize_weight`] serve any device, through
//! the CPU. No op on FP8 can be differentiated: a backward pass that reaches one ends in an error.
//!
//! What a token needs beside its linears has kernels too: [`rms_norm`] and [`silu_mul`] on all these devices,
//! [`attention`] on the CPU and on CUDA, [`rope`] on the CPU, [`rope_append`], which leaves keys and values in a cache,
//! on CUDA. Elsewhere, and where gradients are asked for, they are composed of Candle's ops, with the same arithmetic.
//! [`rms_norm_quantize`], [`add_rms_norm_quantize`] and [`silu_mul_quantize`] give activations as the linears that
//! follow take them: a [`Quantized`] serves any number of products.

mod attention;
mod cast;
mod cat_rows;
#[cfg(feature = "cuda")]
mod cuda;
mod dense_mm;
mod dequantize;
mod device_memory;
mod error;
mod fake_quantize;
mod from_bytes;
#[cfg(any(feature = "cuda", feature = "metal"))]
mod gpu;
mod kernel;
#[cfg(feature = "cuda")]
mod launches;
#[cfg(feature = "metal")]
mod metal;
mod packed_weight;
mod quantize;
mod quantize_weight;
mod quantized;
mod rms_norm;
mod rope;
mod rope_append;
mod scaled_mm;
mod silu_mul;
mod storage;
#[cfg(any(test, feature = "cuda", feature = "metal"))]
mod strides;

pub use attention::{AttentionScratch, Cached, attention, attention_cached};
pub use candle_kernels_fp8::ScaleLayout;
pub use candle_kernels_fp8::cpu::in_pool;
pub use cast::cast;
pub use cat_rows::cat_rows;
pub use dense_mm::dense_mm;
pub use dequantize::{dequantize, dequantize_bytes};
pub use device_memory::{
    MemoryUsage, is_out_of_memory, keep_freed_memory, memory_usage, release_freed_memory,
    reset_peak_memory,
};
pub use fake_quantize::fake_quantize;
pub use from_bytes::from_bytes;
pub use kernel::fp8_kernels;
#[cfg(feature = "cuda")]
pub use launches::{CacheHeads, LaunchActivations, LaunchArgmax, LaunchRope, Launches};
pub use packed_weight::{Codes, PackedWeight, pack_weight};
pub use quantize::{
    quantize, quantize_per_group, quantize_per_tensor, quantize_per_token, quantize_static,
};
pub use quantize_weight::{Rounding, quantize_weight, weight_scale};
pub use quantized::{Quantization, Quantized};
pub use rms_norm::{add_rms_norm, add_rms_norm_quantize, rms_norm, rms_norm_quantize};
pub use rope::rope;
pub use rope_append::{HeadNorms, RopeAppend, rope_append};
pub use scaled_mm::{Input, Weight, check_weight, scaled_mm, scaled_mm_many};
pub use silu_mul::{silu_mul, silu_mul_quantize};
