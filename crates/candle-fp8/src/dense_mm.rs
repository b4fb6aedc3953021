//! Activations times a dense weight: the linears that a checkpoint leaves in BF16.

use candle_core::{DType, Result, Tensor};

use crate::error;

const OP: &str = "dense_mm";

/// `x · weightᵀ`, and a bias added.
///
/// - `x`: BF16, F16 or F32 `[.., K]`, any strides;
/// - `weight`: BF16 `[N, K]`, contiguous;
/// - `bias`: BF16, F16 or F32 `[N]`.
///
/// Gives `[.., N]` in the dtype of `x`.
///
/// # Errors
/// If a dtype, shape or device is not as said above.
pub fn dense_mm(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    error::float(OP, "x", x.dtype())?;
    error::dtype(OP, "weight", weight.dtype(), &[DType::BF16], "BF16")?;
    let (n, k) = error::weight_dims(OP, "weight", weight)?;
    let (m, _) = error::rows(OP, "x", x)?;
    let y = x.reshape((m, k))?.to_dtype(DType::F32)?;
    let y = y.matmul(&weight.to_dtype(DType::F32)?.t()?)?;
    let y = match bias {
        Some(bias) => y.broadcast_add(&bias.to_dtype(DType::F32)?)?,
        None => y,
    };
    let mut shape = x.dims().to_vec();
    shape[x.rank() - 1] = n;
    y.to_dtype(x.dtype())?.reshape(shape)
}
