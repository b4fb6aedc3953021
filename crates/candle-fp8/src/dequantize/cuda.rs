//! Dense weights on NVIDIA GPUs.

use candle_core::cuda_backend::cudarc::driver::DevicePtr;
use candle_core::{CudaDevice, Result, Tensor};
use candle_kernels_fp8::cuda::{self as kernels, Address};

use super::{How, OP};
use crate::cuda::{On, Rows, float, on_cuda, tensor, writes};

/// Codes `[N, K]` and scales in F32.
pub(super) fn dequantize(codes: &Tensor, scale: &Tensor, how: How) -> Result<Tensor> {
    let (storage, layout) = codes.storage_and_layout();
    let (scale, scale_layout) = scale.storage_and_layout();
    let storage = on_cuda(&storage)?;
    let on = On::new(OP, &storage.device);
    let rows = Rows::of(&on, (storage, layout))?;
    let scale = Rows::flat(&on, (on_cuda(&scale)?, scale_layout))?;
    let (codes, scales) = (rows.reads(on.stream())?, scale.reads(on.stream())?);
    let (sizes, codes) = ((rows.m, rows.k), (codes.address, rows.stride));
    // SAFETY: the tensors have the shapes that their layout asks for.
    unsafe { launch(&on, sizes, codes, scales.address, how) }
}

/// From memory of the host: what is sent is a byte for each weight, not a float.
pub(super) fn dequantize_bytes(
    device: &CudaDevice,
    codes: &[u8],
    (n, k): (usize, usize),
    scale: &[f32],
    how: How,
) -> Result<Tensor> {
    let on = On::new(OP, device);
    let (codes, scale) = (device.clone_htod(codes)?, device.clone_htod(scale)?);
    let (codes, _codes) = codes.device_ptr(on.stream());
    let (scales, _scales) = scale.device_ptr(on.stream());
    // SAFETY: the lengths are those that the shape and the layout ask for.
    unsafe { launch(&on, (n, k), (codes, k), scales, how) }
}

/// # Safety
/// The addresses are of codes with a stride, and of scales, as many as the layout says, valid until the stream has passed
/// the launch.
unsafe fn launch(
    on: &On<'_>,
    (n, k): (usize, usize),
    (codes, codes_stride): (Address, usize),
    scales: Address,
    how: How,
) -> Result<Tensor> {
    let mut out = on.alloc(n * k, how.dtype)?;
    {
        let writes = writes(&mut out, on.stream())?;
        let args = kernels::Dequantize {
            n,
            k,
            codes,
            codes_stride,
            scales,
            layout: how.layout,
            scale_float: float(how.scale_dtype)?,
            out: writes.address,
            out_float: float(how.dtype)?,
            dependent: false,
        };
        // SAFETY: there is room for the result; the caller vouches for the rest.
        on.launched(unsafe { kernels::dequantize(on.stream(), &args) })?;
    }
    Ok(tensor(out, (n, k)))
}
