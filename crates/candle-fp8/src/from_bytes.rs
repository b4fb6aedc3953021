//! Tensors of bytes that lie on the host, such as those of a memory-mapped file.

use candle_core::{DType, Device, Result, Shape, Tensor};

/// A tensor of `bytes`, its elements in row-major order, little-endian, on a CUDA device: sent from where they lie, with
/// no copy on the host. `None` for other devices, for dtypes that are not BF16, F16, F32 or F8E4M3, and for no elements.
///
/// # Errors
/// If the number of bytes is not that of the shape, or the device has no memory left.
pub fn from_bytes(
    bytes: &[u8],
    shape: impl Into<Shape>,
    dtype: DType,
    device: &Device,
) -> Result<Option<Tensor>> {
    let known = matches!(dtype, DType::BF16 | DType::F16 | DType::F32 | DType::F8E4M3);
    if !known {
        return Ok(None);
    }
    let shape = shape.into();
    let expected = shape.elem_count() * dtype.size_in_bytes();
    crate::error::length("from_bytes", "bytes", bytes.len(), expected)?;
    #[cfg(feature = "cuda")]
    if let Device::Cuda(cuda) = device {
        return cuda::from_bytes(bytes, shape, dtype, cuda);
    }
    let _ = device;
    Ok(None)
}

#[cfg(feature = "cuda")]
mod cuda {
    use candle_core::cuda_backend::WrapErr;
    use candle_core::cuda_backend::cudarc::driver::result::memcpy_htod_async;
    use candle_core::{CudaDevice, DType, Result, Shape, Tensor};

    use crate::cuda::{On, tensor, writes};

    pub(super) fn from_bytes(
        bytes: &[u8],
        shape: Shape,
        dtype: DType,
        device: &CudaDevice,
    ) -> Result<Option<Tensor>> {
        if bytes.is_empty() {
            return Ok(None);
        }
        let on = On::new("from_bytes", device);
        let mut storage = on.alloc(shape.elem_count(), dtype)?;
        {
            let to = writes(&mut storage, on.stream())?;
            on.stream().context().bind_to_thread().w()?;
            // SAFETY: there is room for as many bytes, and any bits are a value. From memory that is not page-locked, as
            // the caller's, the driver has read everything when it returns.
            unsafe { memcpy_htod_async(to.address, bytes, on.stream().cu_stream()) }.w()?;
        }
        Ok(Some(tensor(storage, shape)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_devices_make_their_own_and_lengths_have_to_fit() {
        let device = Device::Cpu;
        let made = from_bytes(&[0; 12], (2, 3), DType::BF16, &device).unwrap();
        assert!(made.is_none());
        let error = from_bytes(&[0; 11], (2, 3), DType::BF16, &device).unwrap_err();
        assert!(error.to_string().contains("12"), "{error}");
    }
}
