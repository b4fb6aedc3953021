//! Casts on GPUs of Apple silicon.

use candle_core::backend::BackendStorage;
use candle_core::{DType, Result, Tensor};
use candle_kernels_fp8::metal as kernels;

use super::OP;
use crate::metal::{On, Rows, float, on_metal, slice, tensor};

/// From or to F8E4M3.
pub(super) fn cast(x: &Tensor, dtype: DType) -> Result<Tensor> {
    let (storage, layout) = x.storage_and_layout();
    let storage = on_metal(&storage)?;
    let on = On::new(OP, storage.device());
    let from = Rows::flat(&on, (storage, layout))?;
    let out = on.alloc(from.k, dtype)?;
    let (values, to, count) = (from.slice(), slice(&out), from.k);
    match dtype {
        DType::F8E4M3 => kernels::cast_to_e4m3(&on, (values, float(x.dtype())?), to, count)?,
        _ => kernels::cast_from_e4m3(&on, values, (to, float(dtype)?), count)?,
    }
    Ok(tensor(out, x.shape()))
}
