//! Which kernels tensors go to; and to those of the CPU, as float slices of any type.

use candle_core::{DType, Device, Layout, Result, Storage, Tensor, WithDType, bail};
use candle_kernels_fp8::cpu::Element;
use std::ops::Deref;

/// An element of a float tensor.
pub(crate) trait Float: WithDType + Element {}
impl<T: WithDType + Element> Float for T {}

/// Whether FP8 kernels exist for a device, so that weights can stay in FP8 on it: the CPU; NVIDIA GPUs of compute
/// capability 8.9 and newer where this crate is built with its feature `cuda`; and GPUs of Apple silicon with `metal`.
pub fn fp8_kernels(device: &Device) -> bool {
    match device {
        Device::Cpu => true,
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => crate::cuda::serves(device),
        #[cfg(feature = "metal")]
        Device::Metal(_) => crate::metal::serves(device),
        _ => false,
    }
}

/// Whether a kernel for CUDA can run: all tensors are on a GPU that has one, and no gradient is asked for.
#[cfg(feature = "cuda")]
pub(crate) fn serves_cuda(tensors: &[&Tensor]) -> bool {
    let on_cuda = |tensor: &&Tensor| tensor.device().is_cuda() && !tensor.track_op();
    let first = tensors.first().map(|tensor| tensor.device());
    tensors.iter().all(on_cuda) && first.is_some_and(crate::cuda::serves)
}

/// Whether a kernel for Metal can run: all tensors are on a GPU that has one, and no gradient is asked for.
#[cfg(feature = "metal")]
pub(crate) fn serves_metal(tensors: &[&Tensor]) -> bool {
    let on_metal = |tensor: &&Tensor| tensor.device().is_metal() && !tensor.track_op();
    let first = tensors.first().map(|tensor| tensor.device());
    tensors.iter().all(on_metal) && first.is_some_and(crate::metal::serves)
}

/// Whether a kernel for the CPU can run: all tensors are on the CPU, and no gradient is asked for. Where it cannot, ops are composed
/// of Candle's.
pub(crate) fn serves(tensors: &[&Tensor]) -> bool {
    let on_cpu = |tensor: &&Tensor| tensor.device().is_cpu() && !tensor.track_op();
    tensors.iter().all(on_cpu)
}

/// Calls a generic function with the type of a float tensor: `on_float!(op, dtype, T => f::<T>(args))`.
macro_rules! on_float {
    ($op:expr, $dtype:expr, $float:ident => $call:expr) => {
        match $dtype {
            candle_core::DType::F32 => {
                type $float = f32;
                $call
            }
            candle_core::DType::BF16 => {
                type $float = half::bf16;
                $call
            }
            candle_core::DType::F16 => {
                type $float = half::f16;
                $call
            }
            other => $crate::kernel::refused($op, other),
        }
    };
}
pub(crate) use on_float;

pub(crate) fn refused<R>(op: &str, dtype: DType) -> Result<R> {
    bail!("{op}: no kernel for {dtype:?}")
}

/// A tensor's memory, locked for reading.
pub(crate) struct Memory<'a, S> {
    storage: S,
    layout: &'a Layout,
}

/// Locks a tensor's memory for reading.
pub(crate) fn memory(tensor: &Tensor) -> Memory<'_, impl Deref<Target = Storage>> {
    let (storage, layout) = tensor.storage_and_layout();
    Memory { storage, layout }
}

impl<S: Deref<Target = Storage>> Memory<'_, S> {
    /// From the tensor's first element on; all of it and no more if it is contiguous.
    pub(crate) fn values<T: Float>(&self) -> Result<&[T]> {
        let Storage::Cpu(storage) = &*self.storage else {
            bail!("a tensor of another device in a kernel for the CPU");
        };
        let values = storage.as_slice::<T>()?;
        Ok(match self.layout.contiguous_offsets() {
            Some((start, end)) => &values[start..end],
            None => &values[self.layout.start_offset()..],
        })
    }
}

/// A tensor of a kernel's results.
pub(crate) fn tensor<T: Float>(values: Vec<T>, like: &Tensor) -> Tensor {
    crate::storage::tensor(T::to_cpu_storage_owned(values), like.shape())
}
