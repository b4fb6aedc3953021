//! Matrix products on views, and the dtype they run in.

use candle_core::{DType, Device, Result, Tensor};

/// The dtype in which products with views of larger tensors (KV cache, expert stacks) run.
///
/// On the CPU, Candle's BF16 product converts the *whole storage* behind each side to f32, not only
/// the view: one expert of 128 would cost a conversion of all 128. So half-precision views are
/// converted first, which touches only the view, and the product runs in f32.
pub(crate) fn compute_dtype(dtype: DType, device: &Device) -> DType {
    match (dtype, device) {
        (DType::BF16 | DType::F16, Device::Cpu) => DType::F32,
        _ => dtype,
    }
}

/// `x [.., M, K] · wᵀ` for `w [.., N, K]`, a view perhaps; the result is in [`compute_dtype`].
pub(crate) fn matmul_t(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    let dtype = compute_dtype(w.dtype(), w.device());
    x.to_dtype(dtype)?.matmul(&w.to_dtype(dtype)?.t()?)
}
