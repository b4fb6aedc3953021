//! FP8 tensor operations on Intel GPUs (XPUs), through OpenCL, for Candle.
//!
//! Candle has no such device, so it is explicit: an [`XpuDevice`] holds [`XpuWeight`]s, which are uploaded once;
//! activations are tensors on the CPU, and so are results. The library libOpenCL is looked for when it is first used;
//! building needs none.
//!
//! ```no_run
//! use candle_core::{DType, Device, Tensor};
//! use candle_fp8_xpu::{Input, Quantization, XpuDevice, XpuWeight, scaled_mm};
//!
//! # fn main() -> candle_core::Result<()> {
//! for (index, info) in XpuDevice::list()?.iter().enumerate() {
//!     println!("{index}: {}, {} GiB", info.name, info.memory_bytes >> 30);
//! }
//! let device = XpuDevice::new(0)?;
//! let codes = Tensor::zeros((8, 32), DType::F8E4M3, &Device::Cpu)?; // [N, K]
//! let scale = Tensor::ones((8, 1), DType::F32, &Device::Cpu)?; // one for each output feature
//! let weight = XpuWeight::new(&device, &codes, &scale, None, None)?;
//!
//! let x = Tensor::randn(0f32, 1., (2, 3, 32), &Device::Cpu)?; // [.., K]
//! let y = scaled_mm(Input::Quantize(&x, Quantization::PerToken), &weight)?; // F32 [2, 3, 8]
//! # let _ = y;
//! # Ok(())
//! # }
//! ```
//!
//! The arithmetic is that of the crate `candle-fp8` on the CPU: codes, scales and everything elementwise are the same
//! bits, but for the sign of NaN; sums of products are f32, in another order.
//!
//! # Kernels
//! [`Kernels::Plain`] run on any device of OpenCL 1.2, with tiles in registers for many rows, [`Kernels::Subgroups`]
//! where it has Intel's subgroups, and [`Kernels::Matrix`] where it reports matrix units (DPAS): they multiply BF16 or
//! F16, which hold E4M3 codes exactly, and codes become those on their way. The first use of a kernel compiles it.
//!
//! # Failures
//! Every call that waits for the device gives an error if the device was reset or removed ([`Error::Lost`]), and so
//! does every later one. How long a hung device is waited for is up to its driver.

mod device;
mod element;
mod error;
mod kernel_choice;
mod memory;
mod program;
mod quantize;
mod rows;
mod scaled_mm;
mod silu_mul;
mod weight;

pub use device::{XpuDevice, XpuInfo, XpuOptions};
pub(crate) use element::Element;
pub use error::Error;
pub use memory::{Memory, Transfers};
pub use program::Kernels;
pub use quantize::{
    Quantization, quantize_per_group, quantize_per_tensor, quantize_per_token, quantize_static,
};
pub use scaled_mm::{Input, scaled_mm, scaled_mm_many};
pub use silu_mul::{gated_mlp, silu_mul};
pub use weight::XpuWeight;
