//! The kernels on GPUs of Apple silicon.
//!
//! Nothing here talks to a GPU. A function checks that sizes fit together, chooses a kernel, and hands a [`Launch`] to
//! a [`Queue`]: that of a device, or one that runs kernels on the host. Memory is a [`Slice`] of whatever buffers the
//! queue has. The device code is in `kernels/`, compiled by the device from [`Library::source`].
//!
//! Sizes, strides and numbers of elements fit 32 bits.

mod cast;
mod dequantize;
mod fake_quantize;
mod float;
mod launch;
mod library;
mod pad;
mod quantize;
mod rms_norm;
mod rows;
mod scaled_mm;
mod silu_mul;

pub use crate::float::Float;
pub use cast::{cast_from_e4m3, cast_to_e4m3};
pub use dequantize::{Dequantize, dequantize};
pub use fake_quantize::{FakeQuantize, fake_quantize};
pub use launch::{Binding, LANES, Launch, Queue, Slice};
pub use library::Library;
pub use pad::{pad_rows, padded};
pub use quantize::{Quantize, QuantizeTensor, TENSOR_SCALES, quantize, quantize_tensor};
pub use rms_norm::{Residual, RmsNorm, rms_norm};
pub use rows::{Output, Quantization};
pub use scaled_mm::{Activations, Kernel, ScaledMm, Scaling, scaled_mm, scaled_mm_with};
pub use silu_mul::{SiluMul, silu_mul};
