//! What tensors are to kernels of any GPU.

use candle_core::{DType, Result, Tensor, bail};
use candle_kernels_fp8::Float;

/// A float dtype as kernels know it.
pub(crate) fn float(dtype: DType) -> Result<Float> {
    Ok(match dtype {
        DType::BF16 => Float::Bf16,
        DType::F16 => Float::F16,
        DType::F32 => Float::F32,
        other => bail!("{other:?} is not a float of the kernels"),
    })
}

/// The K of a tensor `[.., K]`.
pub(crate) fn columns(tensor: &Tensor) -> usize {
    tensor.dims().last().copied().unwrap_or(1)
}
