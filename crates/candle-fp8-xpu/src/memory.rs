//! Memory of a device, and what moves there and back.

use std::ffi::c_void;
use std::ptr;
use std::sync::Mutex;
use std::sync::atomic::Ordering;

use candle_core::{CpuStorage, DType, InplaceOp1, Layout, Storage, Tensor};
use opencl3::command_queue::{enqueue_svm_map, enqueue_svm_unmap};
use opencl3::error_codes::ClError;
use opencl3::event::Event;
use opencl3::memory::{
    Buffer, CL_MAP_READ, CL_MAP_WRITE_INVALIDATE_REGION, CL_MEM_READ_WRITE,
    CL_MEM_SVM_FINE_GRAIN_BUFFER, ClMem, svm_alloc, svm_free,
};
use opencl3::types::{CL_BLOCKING, cl_map_flags, cl_mem};

use crate::device::lock;
use crate::{Error, XpuDevice};

/// How a device gets at tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Memory {
    /// It has memory of its own, and tensors are copied there.
    Copied,
    /// It shares memory with the host, and the two take turns (coarse-grained shared virtual memory): weights are copied
    /// there once, activations and results by the host, as tensors own theirs, and nothing is sent. What Lunar Lake
    /// offers; those who make Intel's driver say so of every integrated GPU since the eleventh generation.
    Mapped,
    /// As [`Memory::Mapped`], without turns (fine-grained shared virtual memory).
    Shared,
    /// It reads tensors where they lie, and writes results where they stay: nothing is copied.
    Tensors,
}

/// What was copied between tensors and a device's memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Transfers {
    /// Copies of tensors for the device, weights among them.
    pub uploads: u64,
    /// Their bytes.
    pub upload_bytes: u64,
    /// Copies of results; each waits for the device.
    pub downloads: u64,
    /// Their bytes.
    pub download_bytes: u64,
    /// Results that the device wrote into the tensor itself; each waits for the device, too.
    pub results_in_place: u64,
}

/// Memory that the device's kernels can use.
pub(crate) struct Allocation {
    device: XpuDevice,
    place: Place,
    bytes: usize,
}

enum Place {
    Own(Buffer<u8>),
    Shared(*mut c_void),
    /// Of a tensor, which lives as long. Kernels write to it only if nothing else has it: see
    /// [`Allocation::of_result`].
    Tensor {
        start: *const c_void,
        tensor: Tensor,
    },
}

impl Place {
    fn new(device: &XpuDevice, bytes: usize) -> Result<Self, Error> {
        let inner = &device.inner;
        match device.memory() {
            Memory::Copied => {
                // SAFETY: no memory of the host is passed.
                let buffer = unsafe {
                    Buffer::create(&inner.context, CL_MEM_READ_WRITE, bytes, ptr::null_mut())
                };
                device.check_alloc("clCreateBuffer", buffer).map(Self::Own)
            }
            Memory::Mapped | Memory::Shared | Memory::Tensors => {
                let flags = match device.memory() {
                    Memory::Mapped => CL_MEM_READ_WRITE,
                    _ => CL_MEM_READ_WRITE | CL_MEM_SVM_FINE_GRAIN_BUFFER,
                };
                // SAFETY: the device has this kind of memory, or it would not be chosen.
                let start = unsafe { svm_alloc(inner.context.get(), flags, bytes, 64) };
                device
                    .check_alloc("clSVMAlloc", start.map_err(Into::into))
                    .map(Self::Shared)
            }
        }
    }
}

// SAFETY: the pointers are to memory that any thread may use.
unsafe impl Send for Allocation {}
// SAFETY: what writes to the memory is ordered by the device's queue, and by waits for it.
unsafe impl Sync for Allocation {}

/// What a kernel's argument is set to.
pub(crate) enum Pointer {
    Buffer(cl_mem),
    Shared(*const c_void),
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // Kernels that use memory of the host have to be done, after an error too. OpenCL itself keeps a buffer for as
        // long as they take.
        let done = match self.place {
            Place::Own(_) => true,
            _ => self.device.finished(),
        };
        match &self.place {
            Place::Shared(start) if done => {
                // SAFETY: it was allocated in this context, and is not used again.
                let _ = unsafe { svm_free(self.device.inner.context.get(), *start) };
            }
            // What kernels may still write to is never free again.
            Place::Tensor { tensor, .. } if !done => std::mem::forget(tensor.clone()),
            _ => {}
        }
        if !matches!(self.place, Place::Tensor { .. }) {
            self.device
                .inner
                .used_bytes
                .fetch_sub(self.bytes as u64, Ordering::Relaxed);
        }
    }
}

impl Allocation {
    /// Memory of no particular contents.
    pub(crate) fn new(device: &XpuDevice, bytes: usize) -> Result<Self, Error> {
        let inner = &device.inner;
        let bytes = bytes.max(1);
        // Of a device that was lost nothing is asked: what it gave would not be kept.
        device.check("allocate", Ok(()))?;
        // Some drivers give what they do not have, and fail when it is used.
        let taken = |used| has_room(device, used, bytes).then(|| used + bytes as u64);
        let relaxed = Ordering::Relaxed;
        let used = (inner.used_bytes)
            .fetch_update(relaxed, relaxed, taken)
            .map_err(|used| lacks(device, used, bytes))?;
        match Place::new(device, bytes) {
            Ok(place) => Ok(Self {
                device: device.clone(),
                place,
                bytes,
            }),
            Err(error) => {
                inner.used_bytes.fetch_sub(bytes as u64, relaxed);
                Err(match error {
                    Error::Call { .. } => lacks(device, used, bytes),
                    lost => lost,
                })
            }
        }
    }

    /// Memory for a result of this shape, which [`into_tensor`](Self::into_tensor) gives: the tensor's own, where the
    /// device writes there.
    pub(crate) fn of_result(
        device: &XpuDevice,
        dims: &[usize],
        dtype: DType,
    ) -> candle_core::Result<Self> {
        let bytes = bytes_for(dims, dtype);
        if device.memory() != Memory::Tensors || bytes == 0 {
            return Ok(Self::new(device, bytes)?);
        }
        let used = device.used_bytes();
        if !has_room(device, used, bytes) {
            return Err(lacks(device, used, bytes).into());
        }
        let tensor = Tensor::zeros(dims, dtype, &candle_core::Device::Cpu)?;
        let start = Mutex::new(ptr::null());
        tensor.inplace_op1(&Visit(|bytes: &mut [u8]| {
            *lock(&start) = bytes.as_mut_ptr().cast_const().cast();
            Ok(())
        }))?;
        let start = *lock(&start);
        Ok(Self {
            device: device.clone(),
            place: Place::Tensor { start, tensor },
            bytes,
        })
    }

    /// Memory that holds these bytes.
    pub(crate) fn of_bytes(device: &XpuDevice, bytes: &[u8]) -> Result<Self, Error> {
        let mut allocation = Self::new(device, bytes.len())?;
        match &mut allocation.place {
            Place::Own(buffer) => {
                // SAFETY: the buffer is as long as the bytes, and the call waits until they are there.
                let written = unsafe {
                    device
                        .inner
                        .queue
                        .enqueue_write_buffer(buffer, CL_BLOCKING, 0, bytes, &[])
                };
                device.check("clEnqueueWriteBuffer", written)?;
            }
            Place::Shared(start) => {
                let (start, len) = (*start, bytes.len());
                on_host(device, start, len, CL_MAP_WRITE_INVALIDATE_REGION, || {
                    // SAFETY: the memory is as long, and no kernel uses it yet.
                    unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), start.cast(), len) };
                })?;
            }
            Place::Tensor { .. } => unreachable!("what is allocated is no tensor's"),
        }
        let mut transfers = lock(&device.inner.transfers);
        transfers.uploads += 1;
        transfers.upload_bytes += bytes.len() as u64;
        drop(transfers);
        Ok(allocation)
    }

    /// The values of a tensor `[.., k]` in rows that start at multiples of `stride` elements, with zeros between them.
    pub(crate) fn of_tensor(
        device: &XpuDevice,
        tensor: &Tensor,
        k: usize,
        stride: usize,
    ) -> candle_core::Result<Self> {
        let tensor = tensor.contiguous()?;
        let size = tensor.dtype().size_in_bytes();
        let (storage, layout) = tensor.storage_and_layout();
        let all = bytes_of(&storage)?;
        let bytes = &all[layout.start_offset() * size..][..tensor.elem_count() * size];
        // Kernels read 16 bytes at once.
        if device.memory() == Memory::Tensors
            && k == stride
            && bytes.as_ptr().addr().is_multiple_of(16)
        {
            let place = Place::Tensor {
                start: bytes.as_ptr().cast(),
                tensor: tensor.clone(),
            };
            return Ok(Self {
                device: device.clone(),
                place,
                bytes: bytes.len(),
            });
        }
        if k == stride {
            return Ok(Self::of_bytes(device, bytes)?);
        }
        let mut padded = vec![0; bytes.len() / (k * size) * stride * size];
        for (to, from) in padded
            .chunks_exact_mut(stride * size)
            .zip(bytes.chunks_exact(k * size))
        {
            to[..k * size].copy_from_slice(from);
        }
        Ok(Self::of_bytes(device, &padded)?)
    }

    pub(crate) fn pointer(&self) -> Pointer {
        match &self.place {
            Place::Own(buffer) => Pointer::Buffer(buffer.get()),
            Place::Shared(start) => Pointer::Shared(start.cast_const()),
            Place::Tensor { start, .. } => Pointer::Shared(*start),
        }
    }

    /// Waits until the device is done, and copies from the start.
    pub(crate) fn read(&self, to: &mut [u8]) -> Result<(), Error> {
        assert!(to.len() <= self.bytes, "no more than there is");
        let device = &self.device;
        match &self.place {
            Place::Own(buffer) => {
                // SAFETY: the buffer is as long, and the call waits until the bytes are here.
                let read = unsafe {
                    device
                        .inner
                        .queue
                        .enqueue_read_buffer(buffer, CL_BLOCKING, 0, to, &[])
                };
                device.check("clEnqueueReadBuffer", read)?;
            }
            Place::Shared(start) => {
                let (start, len) = (*start, to.len());
                on_host(device, start, len, CL_MAP_READ, || {
                    // SAFETY: the memory is as long, and kernels that use it are done.
                    unsafe { ptr::copy_nonoverlapping(start.cast(), to.as_mut_ptr(), len) };
                })?;
            }
            Place::Tensor { .. } => unreachable!("what is a tensor is not read into another"),
        }
        let mut transfers = lock(&device.inner.transfers);
        transfers.downloads += 1;
        transfers.download_bytes += to.len() as u64;
        Ok(())
    }

    /// What kernels wrote to memory [for a result](Self::of_result), once they are done.
    pub(crate) fn into_tensor(self, dims: &[usize], dtype: DType) -> candle_core::Result<Tensor> {
        let Place::Tensor { tensor, .. } = &self.place else {
            return self.to_tensor(dims, dtype);
        };
        let device = &self.device;
        device.check("clFinish", device.inner.queue.finish())?;
        lock(&device.inner.transfers).results_in_place += 1;
        tensor.reshape(dims)
    }

    /// A copy of the first bytes as a tensor; the tensor itself, where it is one.
    pub(crate) fn to_tensor(&self, dims: &[usize], dtype: DType) -> candle_core::Result<Tensor> {
        if let Place::Tensor { tensor, .. } = &self.place {
            return tensor.reshape(dims);
        }
        let tensor = Tensor::zeros(dims, dtype, &candle_core::Device::Cpu)?;
        tensor.inplace_op1(&Visit(|bytes: &mut [u8]| Ok(self.read(bytes)?)))?;
        Ok(tensor)
    }
}

/// Accesses memory that host and device share, from its start, when kernels that are queued are done; or at once for
/// writing, where they do not take turns: then none may use it. Where they do, later kernels wait.
fn on_host(
    device: &XpuDevice,
    start: *mut c_void,
    bytes: usize,
    flags: cl_map_flags,
    access: impl FnOnce(),
) -> Result<(), Error> {
    if device.memory() != Memory::Mapped {
        if flags == CL_MAP_READ {
            device.check("clFinish", device.inner.queue.finish())?;
        }
        access();
        return Ok(());
    }
    if bytes == 0 {
        return Ok(());
    }
    let queue = device.inner.queue.get();
    // SAFETY: the memory is of this context and as long, and nothing is waited for.
    let turn = unsafe { enqueue_svm_map(queue, CL_BLOCKING, flags, start, bytes, 0, ptr::null()) };
    device.check(
        "clEnqueueSVMMap",
        turn.map(Event::new).map_err(ClError::from),
    )?;
    access();
    // SAFETY: as above; it was mapped.
    let turn = unsafe { enqueue_svm_unmap(queue, start, 0, ptr::null()) };
    device.check(
        "clEnqueueSVMUnmap",
        turn.map(Event::new).map_err(ClError::from),
    )?;
    Ok(())
}

fn has_room(device: &XpuDevice, used: u64, bytes: usize) -> bool {
    let (info, bytes) = (device.info(), bytes as u64);
    bytes <= info.allocation_bytes && used.saturating_add(bytes) <= info.memory_bytes
}

/// Bytes of a tensor; more than any device has, if they are more than can be said.
pub(crate) fn bytes_for(dims: &[usize], dtype: DType) -> usize {
    let count = dims
        .iter()
        .fold(1, |all: usize, &dim| all.saturating_mul(dim));
    count.saturating_mul(dtype.size_in_bytes())
}

fn lacks(device: &XpuDevice, used: u64, bytes: usize) -> Error {
    let info = device.info();
    Error::Memory {
        device: info.name.clone(),
        bytes: bytes as u64,
        used,
        total: info.memory_bytes,
        at_once: info.allocation_bytes,
    }
}

/// Shows a new tensor's bytes.
struct Visit<F>(F);

impl<F: Fn(&mut [u8]) -> candle_core::Result<()>> InplaceOp1 for Visit<F> {
    fn name(&self) -> &'static str {
        "xpu result"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, _: &Layout) -> candle_core::Result<()> {
        (self.0)(bytes_mut(storage)?)
    }
}

/// Memory of plain numbers as bytes.
fn as_bytes<T: Copy>(values: &[T]) -> &[u8] {
    // SAFETY: all of it is initialized, and any bytes are bytes.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

fn as_bytes_mut<T: Copy>(values: &mut [T]) -> &mut [u8] {
    // SAFETY: as above; any bytes are a value of these types, all of which are plain numbers.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
}

fn bytes_of(storage: &Storage) -> candle_core::Result<&[u8]> {
    match storage {
        Storage::Cpu(CpuStorage::BF16(values)) => Ok(as_bytes(values)),
        Storage::Cpu(CpuStorage::F16(values)) => Ok(as_bytes(values)),
        Storage::Cpu(CpuStorage::F32(values)) => Ok(as_bytes(values)),
        Storage::Cpu(CpuStorage::F8E4M3(values)) => Ok(as_bytes(values)),
        _ => candle_core::bail!(
            "a tensor that is not on the CPU, or of a dtype that no kernel takes"
        ),
    }
}

fn bytes_mut(storage: &mut CpuStorage) -> candle_core::Result<&mut [u8]> {
    match storage {
        CpuStorage::BF16(values) => Ok(as_bytes_mut(values)),
        CpuStorage::F16(values) => Ok(as_bytes_mut(values)),
        CpuStorage::F32(values) => Ok(as_bytes_mut(values)),
        CpuStorage::F8E4M3(values) => Ok(as_bytes_mut(values)),
        _ => candle_core::bail!("a tensor of a dtype that no kernel gives"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::XpuOptions;

    /// What one thread asks for in vain is not missing for another one.
    #[test]
    fn a_refusal_takes_no_memory_meanwhile() {
        let options = XpuOptions {
            memory: Some(Memory::Copied),
            memory_bytes: Some(1 << 20),
            ..XpuOptions::default()
        };
        let device = match XpuDevice::with_options(0, options) {
            Ok(device) => device,
            Err(Error::NoOpenCl | Error::NoDevice { .. }) => return,
            Err(error) => panic!("{error}"),
        };
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    assert!(Allocation::new(&device, 1 << 40).is_err());
                }
            });
            let refused = (0..20_000).find_map(|_| Allocation::new(&device, 64).err());
            done.store(true, Ordering::Relaxed);
            assert!(refused.is_none(), "{refused:?}");
        });
        assert_eq!(device.used_bytes(), 0);
    }
}
