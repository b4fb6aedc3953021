//! Dense weights on GPUs of Apple silicon.

use candle_core::backend::BackendStorage;
use candle_core::{DType, MetalDevice, Result, Tensor};
use candle_kernels_fp8::metal::{self as kernels, Slice};
use candle_metal_kernels::metal::Buffer;

use super::{How, OP};
use crate::metal::{On, Rows, float, on_metal, slice, tensor};

/// Codes `[N, K]` and scales in F32.
pub(super) fn dequantize(codes: &Tensor, scale: &Tensor, how: How) -> Result<Tensor> {
    let (storage, layout) = codes.storage_and_layout();
    let (scale, scale_layout) = scale.storage_and_layout();
    let storage = on_metal(&storage)?;
    let on = On::new(OP, storage.device());
    let rows = Rows::of(&on, (storage, layout))?;
    let scale = Rows::flat(&on, (on_metal(&scale)?, scale_layout))?;
    let codes = (rows.slice(), rows.stride);
    launch(&on, (rows.m, rows.k), codes, scale.slice(), how)
}

/// From memory of the host.
pub(super) fn dequantize_bytes(
    device: &MetalDevice,
    codes: &[u8],
    (n, k): (usize, usize),
    scale: &[f32],
    how: How,
) -> Result<Tensor> {
    let on = On::new(OP, device);
    let (codes, scale) = (on.upload(codes, DType::U8)?, on.upload(scale, DType::F32)?);
    launch(&on, (n, k), (slice(&codes), k), slice(&scale), how)
}

fn launch(
    on: &On<'_>,
    (n, k): (usize, usize),
    (codes, codes_stride): (Slice<'_, Buffer>, usize),
    scales: Slice<'_, Buffer>,
    how: How,
) -> Result<Tensor> {
    let out = on.alloc(n * k, how.dtype)?;
    let args = kernels::Dequantize {
        n,
        k,
        codes,
        codes_stride,
        scales,
        layout: how.layout,
        scale_float: float(how.scale_dtype)?,
        out: slice(&out),
        out_float: float(how.dtype)?,
    };
    kernels::dequantize(on, &args)?;
    Ok(tensor(out, (n, k)))
}
