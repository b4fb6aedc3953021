//! FP8 kernels for Candle: slices, pointers and sizes in; no tensors, no checkpoints.
//!
//! Every matrix is row-major and dense. E4M3 values travel as their codes, one `u8` each; [`e4m3`] says what a code
//! means. A function here trusts its sizes: it asserts that the slices fit together and panics if they do not, so
//! whoever calls it (the `candle-fp8` crate) checks first and reports errors in the user's words.
//!
//! ```
//! use candle_kernels_fp8::{ScaleLayout, cpu, e4m3};
//!
//! // One row of three activations, two output features: y = x · wᵀ.
//! let x = [1.0, -2.0, 0.5];
//! let (mut codes, mut scales) = ([0u8; 3], [0f32; 1]);
//! cpu::quantize_groups(&x, 3, 3, &mut codes, &mut scales);
//! assert_eq!(scales, [2.0 / 448.0]);
//!
//! let weight = [1.0, 1.0, 1.0, 2.0, 0.0, -4.0].map(e4m3::encode);
//! let mut outs = [Vec::new()];
//! cpu::scaled_mm(
//!     cpu::InstructionSet::best(),
//!     &cpu::ScaledMm {
//!         m: 1,
//!         k: 3,
//!         activations: cpu::Activations::Codes { codes: &codes, scales: &scales, scaling: cpu::Scaling::Token },
//!         weights: &[cpu::Weight {
//!             n: 2,
//!             codes: &weight,
//!             scales: &[0.5, 0.25],
//!             layout: ScaleLayout::Channel,
//!             bias: None,
//!         }],
//!     },
//!     &mut outs,
//! );
//! let [y] = outs;
//! assert!((y[0] + 0.25).abs() < 1e-6 && y[1].abs() < 1e-6);
//! ```

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod e4m3;
mod float;
mod layout;
pub mod metal;

pub use float::Float;
pub use layout::{RowScales, ScaleLayout};
