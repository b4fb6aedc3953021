//! Norms on GPUs of Apple silicon.

use candle_core::backend::BackendStorage;
use candle_core::{Result, Tensor};
use candle_kernels_fp8::metal::{self as kernels, Residual};
use candle_metal_kernels::metal::Buffer;

use super::OP;
use crate::metal::{Destination, On, Rows, float, on_metal, slice, tensor};

/// Gives what `to` makes of the normalized rows.
pub(super) fn rms_norm<D: Destination>(
    x: &Tensor,
    weight: &Tensor,
    eps: f64,
    to: D,
) -> Result<D::Made> {
    let (storage, layout) = x.storage_and_layout();
    let storage = on_metal(&storage)?;
    let on = On::new(OP, storage.device());
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
    let storage = on_metal(&storage)?;
    let on = On::new(OP, storage.device());
    let rows = Rows::of(&on, (storage, layout))?;
    let values = Rows::of(&on, (on_metal(&residual)?, residual_layout))?;
    let sum = on.alloc(x.elem_count(), x.dtype())?;
    let residual = Residual {
        values: values.slice(),
        stride: values.stride,
        sum: slice(&sum),
        sum_stride: rows.k,
    };
    let made = launch(&on, x, &rows, Some(residual), weight, eps, to)?;
    Ok((tensor(sum, x.shape()), made))
}

fn launch<D: Destination>(
    on: &On<'_>,
    x: &Tensor,
    rows: &Rows<'_>,
    residual: Option<Residual<'_, Buffer>>,
    weight: &Tensor,
    eps: f64,
    to: D,
) -> Result<D::Made> {
    let (weight, layout) = weight.storage_and_layout();
    let weight = Rows::flat(on, (on_metal(&weight)?, layout))?;
    let float = float(x.dtype())?;
    to.make(on, x, |out| {
        let args = kernels::RmsNorm {
            m: rows.m,
            k: rows.k,
            x: rows.slice(),
            row_stride: rows.stride,
            residual,
            weight: weight.slice(),
            eps: eps as f32,
            float,
            out,
        };
        kernels::rms_norm(on, &args)
    })
}
