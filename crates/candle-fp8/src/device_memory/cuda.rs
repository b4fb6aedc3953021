//! The pool of a CUDA device.

use candle_core::backend::BackendDevice;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{result, sys};
use candle_core::{CudaDevice, Result};
use std::ffi::c_void;

use super::MemoryUsage;

pub(super) fn usage(device: &CudaDevice) -> Result<Option<MemoryUsage>> {
    device.synchronize()?;
    let Some(pool) = Pool::of(device)? else {
        return Ok(None);
    };
    use sys::CUmemPool_attribute as Attribute;
    let used = pool.get(Attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?;
    let peak = pool.get(Attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH)?;
    let reserved = pool.get(Attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?;
    let (free, total) = device.cuda_stream().context().mem_get_info().w()?;
    let (free, total) = (free as u64, total as u64);
    Ok(Some(MemoryUsage {
        total,
        used,
        peak: peak.max(used),
        outside: total.saturating_sub(free).saturating_sub(reserved),
    }))
}

pub(super) fn reset_peak(device: &CudaDevice) -> Result<()> {
    device.synchronize()?;
    // No other value than zero is taken; the peak is then what is in use.
    let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
    Pool::of(device)?.map_or(Ok(()), |pool| pool.set(attribute, 0))
}

pub(super) fn keep_freed(device: &CudaDevice) -> Result<()> {
    let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    Pool::of(device)?.map_or(Ok(()), |pool| pool.set(attribute, u64::MAX))
}

pub(super) fn release_freed(device: &CudaDevice) -> Result<()> {
    device.synchronize()?;
    match Pool::of(device)? {
        // SAFETY: the pool is the device's own.
        Some(Pool(pool)) => unsafe { result::mem_pool::trim_to(pool, 0) }.w(),
        None => Ok(()),
    }
}

/// What `cuMemAllocAsync` takes memory from.
struct Pool(sys::CUmemoryPool);

impl Pool {
    /// `None` where the driver allocates without one.
    fn of(device: &CudaDevice) -> Result<Option<Self>> {
        let stream = device.cuda_stream();
        let context = stream.context();
        if !context.has_async_alloc() {
            return Ok(None);
        }
        context.bind_to_thread().w()?;
        // SAFETY: the context's device is one that the driver gave out.
        let pool = unsafe { result::device::get_mem_pool(context.cu_device()) }.w()?;
        Ok(Some(Self(pool)))
    }

    /// One of the attributes that are a number of bytes.
    fn get(&self, attribute: sys::CUmemPool_attribute) -> Result<u64> {
        let mut bytes = 0u64;
        let value = (&raw mut bytes).cast::<c_void>();
        // SAFETY: the pool is the device's own, and these attributes are of 64 bits.
        unsafe { result::mem_pool::get_attribute(self.0, attribute, value) }.w()?;
        Ok(bytes)
    }

    /// One of the attributes that are a number of bytes.
    fn set(&self, attribute: sys::CUmemPool_attribute, mut bytes: u64) -> Result<()> {
        let value = (&raw mut bytes).cast::<c_void>();
        // SAFETY: the pool is the device's own, and these attributes are of 64 bits.
        unsafe { result::mem_pool::set_attribute(self.0, attribute, value) }.w()
    }
}
