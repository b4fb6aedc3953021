//! Norms on NVIDIA GPUs.

use candle_core::{Result, Tensor};
use candle_kernels_fp8::cuda::{self as kernels, Residual};

use super::OP;
use crate::cuda::{Destination, On, Rows, float, on_cuda, tensor, writes};

/// Gives what `to` makes of the normalized rows.
pub(super) fn rms_norm<D: Destination>(
    x: &Tensor,
    weight: &Tensor,
    eps: f64,
    to: D,
) -> Result<D::Made> {
    let (storage, layout) = x.storage_and_layout();
    let storage = on_cuda(&storage)?;
    let on = On::new(OP, &storage.device);
    let rows = Rows::of(&on, (storage, layout))?;
    launch(&on, x, &rows, None, weight, eps, to)
}

/// Gives the sum, and what `to` makes of its normalized rows.
pub(super) fn add_rms_norm<D: Destination>(
    x: &Tensor,
    residual: &Tensor,
    weight: &Tensor,
    eps: f64,
    to: D,
) -> Result<(Tensor, D::Made)> {
    let (storage, layout) = x.storage_and_layout();
    let (residual, residual_layout) = residual.storage_and_layout();
    let storage = on_cuda(&storage)?;
    let on = On::new(OP, &storage.device);
    let rows = Rows::of(&on, (storage, layout))?;
    let residual = Rows::of(&on, (on_cuda(&residual)?, residual_layout))?;
    let mut sum = on.alloc(x.elem_count(), x.dtype())?;
    let made = {
        let values = residual.reads(on.stream())?;
        let sum = writes(&mut sum, on.stream())?;
        let residual = Residual {
            values: values.address,
            stride: residual.stride,
            sum: sum.address,
            sum_stride: rows.k,
        };
        launch(&on, x, &rows, Some(residual), weight, eps, to)?
    };
    Ok((tensor(sum, x.shape()), made))
}

fn launch<D: Destination>(
    on: &On<'_>,
    x: &Tensor,
    rows: &Rows<'_>,
    residual: Option<Residual>,
    weight: &Tensor,
    eps: f64,
    to: D,
) -> Result<D::Made> {
    let (weight, layout) = weight.storage_and_layout();
    let weight = Rows::flat(on, (on_cuda(&weight)?, layout))?;
    let (values, weights) = (rows.reads(on.stream())?, weight.reads(on.stream())?);
    let float = float(x.dtype())?;
    to.make(on, x, |out| {
        let args = kernels::RmsNorm {
            m: rows.m,
            k: rows.k,
            x: values.address,
            row_stride: rows.stride,
            residual,
            weight: weights.address,
            eps: eps as f32,
            float,
            out,
            dependent: false,
        };
        // SAFETY: the shapes are checked; all lives until it is freed in the stream's order.
        unsafe { kernels::rms_norm(on.stream(), &args) }
    })
}
