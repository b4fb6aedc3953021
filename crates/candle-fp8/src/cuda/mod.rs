//! From tensors on an NVIDIA GPU to its kernels.

mod memory;
mod output;

use candle_core::backend::BackendDevice;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaStream, sys};
use candle_core::{CudaDevice, CudaStorage, DType, Device, Layout, Result, Shape, Storage, bail};
use candle_kernels_fp8::cuda::{self as kernels, Address, Gpu};
use std::sync::Arc;

use crate::error::Error;
pub(crate) use crate::gpu::float;

pub(crate) use memory::{Rows, first, in_place, writes};
pub(crate) use output::{Destination, Values, codes, tensor};

/// A tensor's memory on a GPU, and where in it the tensor lies.
pub(crate) type View<'a> = (&'a CudaStorage, &'a Layout);

/// What a launch answers.
pub(crate) type KernelResult = std::result::Result<(), kernels::Error>;

/// An op and where it runs.
pub(crate) struct On<'a> {
    op: &'static str,
    device: &'a CudaDevice,
    stream: Arc<CudaStream>,
}

impl<'a> On<'a> {
    pub(crate) fn new(op: &'static str, device: &'a CudaDevice) -> Self {
        let stream = device.cuda_stream();
        Self { op, device, stream }
    }

    /// The device.
    pub(crate) fn device(&self) -> &'a CudaDevice {
        self.device
    }

    /// What kernels are launched on.
    pub(crate) fn stream(&self) -> &CudaStream {
        &self.stream
    }

    /// What a launch answered, in the op's name.
    pub(crate) fn launched(&self, result: KernelResult) -> Result<()> {
        let op = self.op;
        Ok(result.map_err(|error| match error {
            kernels::Error::TooOld { major, minor } => Error::TooOld { op, major, minor },
            source => Error::Driver { op, source },
        })?)
    }

    /// Memory for so many elements, and for one at least, since drivers give none of no size. It holds anything: kernels
    /// write before others read.
    pub(crate) fn alloc(&self, len: usize, dtype: DType) -> Result<CudaStorage> {
        // SAFETY: any bits are a value of the types that tensors have.
        unsafe { self.device.alloc_uninit(&Shape::from(len.max(1)), dtype) }
    }

    /// Writes a value, when the stream gets there.
    ///
    /// # Safety
    /// The address is of an F32 of the device's memory, valid until the stream has passed the call.
    pub(crate) unsafe fn write(&self, to: Address, value: f32) -> Result<()> {
        self.stream.context().bind_to_thread().w()?;
        // SAFETY: the caller vouches for the address.
        let result =
            unsafe { sys::cuMemsetD32Async(to, value.to_bits(), 1, self.stream.cu_stream()) };
        result.result().w()
    }

    /// Copies bytes, when the stream gets there.
    ///
    /// # Safety
    /// The addresses are of so many bytes of the device's memory, which do not overlap, and are valid until the stream
    /// has passed the call.
    pub(crate) unsafe fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.stream.context().bind_to_thread().w()?;
        // SAFETY: the caller vouches for the addresses.
        let result = unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, bytes, self.stream.cu_stream()) };
        result.result().w()
    }
}

/// The storage of a tensor that is on a GPU.
pub(crate) fn on_cuda(storage: &Storage) -> Result<&CudaStorage> {
    match storage {
        Storage::Cuda(storage) => Ok(storage),
        _ => bail!("a tensor of another device in a kernel for CUDA"),
    }
}

/// Whether a device has the units that the kernels use.
pub(crate) fn serves(device: &Device) -> bool {
    match device {
        Device::Cuda(device) => Gpu::of(&device.cuda_stream()).is_ok(),
        _ => false,
    }
}
