//! Memory and time on the GPU.

use candle_kernels_fp8::cuda::{Address, Error};
use cudarc::driver::sys::{CUevent_flags, CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr, DeviceRepr, result};
use std::ops::Range;
use std::sync::Arc;

pub(crate) type Failed = Box<dyn std::error::Error>;

pub(crate) struct Device {
    pub(crate) stream: Arc<CudaStream>,
}

/// Memory of the device, with its address.
pub(crate) struct Buffer<T> {
    slice: CudaSlice<T>,
    pub(crate) address: Address,
}

impl Device {
    pub(crate) fn new() -> Result<Self, Failed> {
        let context = CudaContext::new(0)?;
        // SAFETY: everything here happens on one stream.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream()?;
        Ok(Self { stream })
    }

    pub(crate) fn upload<T: DeviceRepr>(&self, values: &[T]) -> Result<Buffer<T>, Failed> {
        Ok(self.buffer(self.stream.clone_htod(values)?))
    }

    fn buffer<T>(&self, slice: CudaSlice<T>) -> Buffer<T> {
        let (address, _) = slice.device_ptr(&self.stream);
        Buffer { slice, address }
    }

    pub(crate) fn copy<T: DeviceRepr>(&self, from: &Buffer<T>) -> Result<Buffer<T>, Failed> {
        Ok(self.buffer(self.stream.clone_dtod(&from.slice)?))
    }

    pub(crate) fn download<T: DeviceRepr + Clone + Default>(
        &self,
        from: &Buffer<T>,
    ) -> Result<Vec<T>, Failed> {
        Ok(self.stream.clone_dtoh(&from.slice)?)
    }

    /// Some of what memory holds.
    pub(crate) fn download_part<T: DeviceRepr + Clone + Default>(
        &self,
        from: &Buffer<T>,
        part: Range<usize>,
    ) -> Result<Vec<T>, Failed> {
        Ok(self.stream.clone_dtoh(&from.slice.slice(part))?)
    }

    /// Memory of `count` elements, [poisoned](Self::poison).
    pub(crate) fn room<T: DeviceRepr>(&self, count: usize) -> Result<Buffer<T>, Failed> {
        // SAFETY: it is filled before anything reads it.
        let buffer = self.buffer(unsafe { self.stream.alloc(count) }?);
        self.poison(&buffer)?;
        Ok(buffer)
    }

    /// Makes all bits ones: NaN as a code and as a float.
    pub(crate) fn poison<T>(&self, buffer: &Buffer<T>) -> Result<(), Failed> {
        let (bytes, stream) = (buffer.slice.num_bytes(), self.stream.cu_stream());
        // SAFETY: the memory has as many bytes, and holds integers or floats, which may have any bits.
        unsafe { result::memset_d8_async(buffer.address, 0xff, bytes, stream) }?;
        Ok(())
    }

    /// Seconds of one of the launches that `launch` makes for each of `0..count`: the median of graph replays.
    pub(crate) fn time(
        &self,
        replays: usize,
        count: usize,
        launch: impl Fn(usize) -> Result<(), Error>,
    ) -> Result<f64, Failed> {
        // Loads the kernel, which a capture must not do.
        launch(0)?;
        self.stream.synchronize()?;
        self.stream
            .begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED)?;
        for i in 0..count {
            launch(i)?;
        }
        // SAFETY: zero is "no flags".
        let flags: CUgraphInstantiate_flags = unsafe { std::mem::transmute(0u32) };
        let graph = self.stream.end_capture(flags)?.ok_or("an empty graph")?;
        for _ in 0..2 {
            graph.launch()?;
        }
        let timing = Some(CUevent_flags::CU_EVENT_DEFAULT);
        let mut seconds = Vec::with_capacity(replays);
        for _ in 0..replays {
            let start = self.stream.record_event(timing)?;
            graph.launch()?;
            let end = self.stream.record_event(timing)?;
            end.synchronize()?;
            seconds.push(f64::from(start.elapsed_ms(&end)?) / 1e3 / count as f64);
        }
        seconds.sort_by(f64::total_cmp);
        Ok(seconds[replays / 2])
    }
}
