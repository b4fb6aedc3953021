//! The kernels on NVIDIA GPUs of compute capability 8.9 and newer, with Hopper's own instructions on 9.0.
//!
//! Arguments are addresses of device memory, and nothing is allocated here. A function checks that sizes fit together,
//! chooses a kernel ([`Gpu`] says what the device can do) and launches it on a stream; errors of the kernel itself surface
//! when the stream is synchronized, as everywhere in CUDA. The device code is in `kernels/`, compiled when the crate is.
//!
//! # Dependent launches
//! Kernels for one token are so short that starting them costs as much as running them. With `dependent`, a kernel is
//! launched while the one before it on the stream still runs (programmatic dependent launch, on Hopper and newer); it waits
//! for it only before it reads activations. So the caller promises that no work in flight on the stream writes what the
//! kernel reads of a weight: codes, scales, bias.

mod error;
mod float;
mod gpu;
mod launch;
mod library;
pub mod probe;
mod scaled_mm;

pub use error::Error;
pub use float::Float;
pub use gpu::Gpu;
pub use scaled_mm::{
    Accumulation, Activations, Kernel, ScaledMm, Scaling, scaled_mm, scaled_mm_with,
};

/// An address of device memory.
pub type Address = cudarc::driver::sys::CUdeviceptr;
