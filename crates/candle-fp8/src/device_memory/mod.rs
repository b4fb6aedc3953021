//! How much of a device's memory is in use, and what becomes of memory that is freed.
//!
//! Candle takes a GPU's memory from a pool of the driver's, in the order of a stream. As the driver sets it up, the pool
//! gives back what is free whenever something waits for the device, and the next tensors have to be mapped anew. See
//! [`keep_freed_memory`].

#[cfg(feature = "cuda")]
mod cuda;

use candle_core::{Device, Error, Result};

/// Bytes of a GPU's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryUsage {
    /// What the device has.
    pub total: u64,
    /// What tensors of this process take, and whatever else it takes from the same pool.
    pub used: u64,
    /// The most that `used` has been since the start, or since [`reset_peak_memory`].
    pub peak: u64,
    /// What is taken outside of the pool, by this process (its context, code of kernels, captured graphs) and by others.
    pub outside: u64,
}

impl MemoryUsage {
    /// What new tensors can take.
    pub fn free(&self) -> u64 {
        self.total
            .saturating_sub(self.used)
            .saturating_sub(self.outside)
    }
}

/// The memory of a CUDA device, after everything that was started on it has ended. `None` for other devices, and where
/// the driver has no pool.
///
/// # Errors
/// If the driver fails.
pub fn memory_usage(device: &Device) -> Result<Option<MemoryUsage>> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(cuda) = device {
        return cuda::usage(cuda);
    }
    let _ = device;
    Ok(None)
}

/// Starts [`MemoryUsage::peak`] anew, from what is in use now.
///
/// # Errors
/// If the driver fails.
pub fn reset_peak_memory(device: &Device) -> Result<()> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(cuda) = device {
        return cuda::reset_peak(cuda);
    }
    let _ = device;
    Ok(())
}

/// Lets a CUDA device's pool keep memory that is freed, for the tensors that come next, rather than give it back to the
/// driver each time that something waits for the device. A forward pass that is waited for, such as each of a generation,
/// is faster for it; other processes see the most that was ever in use as taken. [`release_freed_memory`] ends that for
/// what is free then. Nothing happens on other devices.
///
/// It is a setting of the device's pool, and so of the whole process.
///
/// # Errors
/// If the driver fails.
pub fn keep_freed_memory(device: &Device) -> Result<()> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(cuda) = device {
        return cuda::keep_freed(cuda);
    }
    let _ = device;
    Ok(())
}

/// Waits for a CUDA device, and gives what its pool has free back to the driver. Nothing happens on other devices.
///
/// # Errors
/// If the driver fails.
pub fn release_freed_memory(device: &Device) -> Result<()> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(cuda) = device {
        return cuda::release_freed(cuda);
    }
    let _ = device;
    Ok(())
}

/// Whether an error says that a device has no memory left. The device is as it was: what fits can still be made.
pub fn is_out_of_memory(error: &Error) -> bool {
    // Errors come wrapped in others, some of which can only be printed. All of them name the driver's or the library's
    // status.
    let text = error.to_string();
    ["CUDA_ERROR_OUT_OF_MEMORY", "STATUS_ALLOC"]
        .iter()
        .any(|status| text.contains(status))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_has_no_pool() {
        let device = Device::Cpu;
        assert_eq!(memory_usage(&device).unwrap(), None);
        keep_freed_memory(&device).unwrap();
        release_freed_memory(&device).unwrap();
        reset_peak_memory(&device).unwrap();
    }

    #[test]
    fn what_is_free_is_what_nobody_has() {
        let usage = MemoryUsage {
            total: 100,
            used: 30,
            peak: 50,
            outside: 20,
        };
        assert_eq!(usage.free(), 50);
        let full = MemoryUsage { used: 90, ..usage };
        assert_eq!(full.free(), 0);
    }

    #[test]
    fn an_error_is_known_by_its_status_however_it_is_wrapped() {
        let text = "DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")";
        let plain = Error::Msg(text.into());
        assert!(is_out_of_memory(&plain));
        assert!(is_out_of_memory(&Error::wrap(text)));
        assert!(is_out_of_memory(&plain.context("loading a weight").bt()));
        let cublas = Error::Msg("CublasError(CUBLAS_STATUS_ALLOC_FAILED)".into());
        assert!(is_out_of_memory(&cublas));
        assert!(!is_out_of_memory(&Error::Msg(
            "CUDA_ERROR_LAUNCH_FAILED".into()
        )));
    }
}
