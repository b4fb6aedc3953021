//! From tensors on a GPU of Apple silicon to its kernels.

mod memory;
mod output;
mod pipelines;

use candle_core::{
    DType, Device, Layout, MetalDevice, MetalError, MetalStorage, Result, Storage, bail,
};
use candle_kernels_fp8::metal::{Binding, Launch, Queue, Slice};
use candle_metal_kernels::metal::{Buffer, ComputeCommandEncoder};
use objc2_metal::{MTLDevice, MTLGPUFamily, MTLSize};
use std::sync::Arc;

use crate::error::Error;
pub(crate) use crate::gpu::float;

pub(crate) use memory::{Rows, slice};
pub(crate) use output::{Destination, Values, codes, of_rows, scale, tensor};

/// A tensor's memory on a GPU, and where in it the tensor lies.
pub(crate) type View<'a> = (&'a MetalStorage, &'a Layout);

/// An op and where it runs.
pub(crate) struct On<'a> {
    op: &'static str,
    device: &'a MetalDevice,
}

impl<'a> On<'a> {
    pub(crate) fn new(op: &'static str, device: &'a MetalDevice) -> Self {
        Self { op, device }
    }

    /// Memory for so many elements: a buffer that Candle does not give to another tensor as long as this `Arc` or a
    /// clone of it is there. A buffer of its own made of `Buffer::clone` would not keep it.
    pub(crate) fn buffer(&self, len: usize, dtype: DType) -> Result<Arc<Buffer>> {
        let buffer = self.device.new_buffer_builder();
        // No buffer is empty.
        buffer.with_size_for(len.max(1), dtype).build()
    }

    /// Memory as elements of a type.
    pub(crate) fn storage(&self, buffer: Arc<Buffer>, len: usize, dtype: DType) -> MetalStorage {
        MetalStorage::new(buffer, self.device.clone(), len.max(1), dtype)
    }

    /// Memory for so many elements, and for one at least. It holds anything: kernels write before others read. Candle
    /// may give it to another tensor as soon as this one is gone: what is launched later waits.
    pub(crate) fn alloc(&self, len: usize, dtype: DType) -> Result<MetalStorage> {
        Ok(self.storage(self.buffer(len, dtype)?, len, dtype))
    }

    /// Memory that holds these bytes as elements of a type.
    pub(crate) fn upload<T>(&self, values: &[T], dtype: DType) -> Result<MetalStorage> {
        let buffer = self.device.new_buffer_builder().with_data(values).build()?;
        let len = size_of_val(values) / dtype.size_in_bytes();
        Ok(self.storage(buffer, len, dtype))
    }
}

impl Queue for On<'_> {
    type Buffer = Buffer;
    type Error = candle_core::Error;

    fn launch(&self, launch: &Launch<'_, Buffer>) -> Result<()> {
        if !has_matrices(self.device) {
            return Err(Error::NoMatrices { op: self.op }.into());
        }
        let pipeline = pipelines::pipeline(self.device, launch.library, launch.kernel)
            .map_err(|source| self.error(source.into()))?;
        let most = pipeline.max_total_threads_per_threadgroup();
        if launch.threads > most {
            let (kernel, threads) = (launch.kernel, launch.threads);
            let text =
                format!("{kernel}: groups of {threads} threads, of which it can have {most}");
            return Err(self.error(MetalError::Message(text)));
        }
        // Candle's encoder, which orders what it dispatches by the buffers that are read and written.
        let encoder = self.device.command_encoder()?;
        let encoder: &ComputeCommandEncoder = encoder.as_ref();
        encoder.set_compute_pipeline_state(&pipeline);
        let words = launch.words;
        encoder.set_bytes_directly(0, size_of_val(words), words.as_ptr().cast());
        for (index, binding) in (1..).zip(launch.buffers) {
            match binding {
                Binding::Read(Slice { buffer, offset }) => {
                    encoder.set_input_buffer(index, Some(buffer), *offset);
                }
                Binding::Write(Slice { buffer, offset }) => {
                    encoder.set_output_buffer(index, Some(buffer), *offset);
                }
            }
        }
        let line = |width| MTLSize {
            width,
            height: 1,
            depth: 1,
        };
        encoder.dispatch_thread_groups(line(launch.groups), line(launch.threads));
        Ok(())
    }
}

impl On<'_> {
    fn error(&self, source: MetalError) -> candle_core::Error {
        let op = self.op;
        Error::Metal { op, source }.into()
    }
}

/// The storage of a tensor that is on a GPU.
pub(crate) fn on_metal(storage: &Storage) -> Result<&MetalStorage> {
    match storage {
        Storage::Metal(storage) => Ok(storage),
        _ => bail!("a tensor of another device in a kernel for Metal"),
    }
}

/// Whether a device has the units that the kernels use.
pub(crate) fn serves(device: &Device) -> bool {
    match device {
        Device::Metal(device) => has_matrices(device),
        _ => false,
    }
}

/// Those that came with M1.
fn has_matrices(device: &MetalDevice) -> bool {
    let raw = device.metal_device().as_ref();
    raw.supportsFamily(MTLGPUFamily::Apple7)
}
