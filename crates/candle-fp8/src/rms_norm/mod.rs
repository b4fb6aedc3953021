//! RMS norm, with the rounding of transformers.

#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "metal")]
mod metal;

use candle_core::{D, DType, Result, Tensor};
use candle_kernels_fp8::cpu::{self, InstructionSet};

use crate::kernel::{self, Float, memory, on_float};
use crate::{Quantization, Quantized, error};

const OP: &str = "rms_norm";

/// `weight · cast(x / √(mean(x²) + eps))` of each row of `x`: the quotient is computed in f32 and rounded to the dtype of
/// `x`, the product is rounded again.
///
/// `x`: BF16, F16 or F32 `[.., K]`, any strides; `weight`: `[K]` in the dtype of `x`. Gives `[.., K]` in that dtype.
///
/// # Errors
/// If a dtype, shape or device is not as said above.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let k = check(x, weight)?;
    #[cfg(feature = "cuda")]
    if kernel::serves_cuda(&[x, weight]) {
        return cuda::rms_norm(x, weight, eps, crate::cuda::Values);
    }
    #[cfg(feature = "metal")]
    if kernel::serves_metal(&[x, weight]) {
        return metal::rms_norm(x, weight, eps, crate::metal::Values);
    }
    if !kernel::serves(&[x, weight]) {
        return composed(x, weight, eps);
    }
    let (x, weight) = (x.contiguous()?, weight.contiguous()?);
    fn run<T: Float>(k: usize, x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
        let (x_memory, weight) = (memory(x), memory(weight));
        let values = x_memory.values::<T>()?;
        let mut out = Vec::new();
        let set = InstructionSet::best();
        cpu::rms_norm(set, k, values, weight.values()?, eps as f32, &mut out);
        Ok(kernel::tensor(out, x))
    }
    on_float!(OP, x.dtype(), T => run::<T>(k, &x, &weight, eps))
}

/// Adds `x` to the residual stream and takes the norm of the sum: gives `(x + residual, rms_norm(x + residual))`, each
/// in the dtype of `x`.
///
/// `residual`: shape and dtype of `x`; else as [`rms_norm`].
///
/// # Errors
/// If a dtype, shape or device is not as said above.
pub fn add_rms_norm(
    x: &Tensor,
    residual: &Tensor,
    weight: &Tensor,
    eps: f64,
) -> Result<(Tensor, Tensor)> {
    let k = check(x, weight)?;
    error::same(OP, "residual", residual, x)?;
    #[cfg(feature = "cuda")]
    if kernel::serves_cuda(&[x, residual, weight]) {
        return cuda::add_rms_norm(x, residual, weight, eps, crate::cuda::Values);
    }
    #[cfg(feature = "metal")]
    if kernel::serves_metal(&[x, residual, weight]) {
        return metal::add_rms_norm(x, residual, weight, eps, crate::metal::Values);
    }
    if !kernel::serves(&[x, residual, weight]) {
        let sum = (x + residual)?;
        let normed = composed(&sum, weight, eps)?;
        return Ok((sum, normed));
    }
    let [x, residual, weight] = [
        x.contiguous()?,
        residual.contiguous()?,
        weight.contiguous()?,
    ];
    fn run<T: Float>(
        k: usize,
        [x, residual, weight]: [&Tensor; 3],
        eps: f64,
    ) -> Result<(Tensor, Tensor)> {
        let [x_memory, residual, weight] = [x, residual, weight].map(memory);
        let values = x_memory.values::<T>()?;
        let (mut sum, mut out) = (Vec::new(), Vec::new());
        cpu::add_rms_norm(
            InstructionSet::best(),
            k,
            values,
            residual.values()?,
            weight.values()?,
            eps as f32,
            &mut sum,
            &mut out,
        );
        Ok((kernel::tensor(sum, x), kernel::tensor(out, x)))
    }
    on_float!(OP, x.dtype(), T => run::<T>(k, [&x, &residual, &weight], eps))
}

/// [`rms_norm`], quantized for the linears that follow: what [`quantize`](crate::quantize) makes of it.
///
/// On GPUs one kernel does both, except for [`Quantization::PerTensor`]. No gradient passes.
///
/// # Errors
/// Those of [`rms_norm`] and [`quantize`](crate::quantize).
pub fn rms_norm_quantize(
    x: &Tensor,
    weight: &Tensor,
    eps: f64,
    quantization: Quantization,
) -> Result<Quantized> {
    #[cfg(feature = "cuda")]
    if quantization.of_rows() && kernel::serves_cuda(&[x, weight]) {
        check(x, weight)?;
        error::quantization(OP, "input_scale", quantization)?;
        return cuda::rms_norm(x, weight, eps, quantization);
    }
    #[cfg(feature = "metal")]
    if quantization.of_rows() && kernel::serves_metal(&[x, weight]) {
        check(x, weight)?;
        error::quantization(OP, "input_scale", quantization)?;
        return metal::rms_norm(x, weight, eps, quantization);
    }
    crate::quantize(&rms_norm(x, weight, eps)?, quantization)
}

/// [`add_rms_norm`], its second result quantized for the linears that follow: what [`quantize`](crate::quantize) makes
/// of it.
///
/// On GPUs one kernel does both, except for [`Quantization::PerTensor`]. No gradient passes to what is quantized.
///
/// # Errors
/// Those of [`add_rms_norm`] and [`quantize`](crate::quantize).
pub fn add_rms_norm_quantize(
    x: &Tensor,
    residual: &Tensor,
    weight: &Tensor,
    eps: f64,
    quantization: Quantization,
) -> Result<(Tensor, Quantized)> {
    #[cfg(feature = "cuda")]
    if quantization.of_rows() && kernel::serves_cuda(&[x, residual, weight]) {
        check(x, weight)?;
        error::same(OP, "residual", residual, x)?;
        error::quantization(OP, "input_scale", quantization)?;
        return cuda::add_rms_norm(x, residual, weight, eps, quantization);
    }
    #[cfg(feature = "metal")]
    if quantization.of_rows() && kernel::serves_metal(&[x, residual, weight]) {
        check(x, weight)?;
        error::same(OP, "residual", residual, x)?;
        error::quantization(OP, "input_scale", quantization)?;
        return metal::add_rms_norm(x, residual, weight, eps, quantization);
    }
    let (sum, normed) = add_rms_norm(x, residual, weight, eps)?;
    Ok((sum, crate::quantize(&normed, quantization)?))
}

fn check(x: &Tensor, weight: &Tensor) -> Result<usize> {
    error::float(OP, "x", x.dtype())?;
    let (_, k) = error::rows(OP, "x", x)?;
    error::shape(OP, "weight", weight, &[k], "one for each column of x")?;
    error::dtype(OP, "weight", weight.dtype(), &[x.dtype()], "the dtype of x")?;
    error::device(OP, "weight", weight, x.device())?;
    Ok(k)
}

fn composed(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let wide = x.to_dtype(DType::F32)?;
    let mean = wide.sqr()?.mean_keepdim(D::Minus1)?;
    let quotient = wide.broadcast_div(&(mean + eps)?.sqrt()?)?;
    quotient.to_dtype(x.dtype())?.broadcast_mul(weight)
}
