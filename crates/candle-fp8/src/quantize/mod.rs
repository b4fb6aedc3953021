//! Activations to E4M3.

pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
#[cfg(feature = "metal")]
pub(crate) mod metal;

use candle_core::{CpuStorage, Result, Tensor};

use crate::error;
use crate::storage;
use crate::{Quantization, Quantized};

/// Quantizes each row of `x` with a scale of its own.
///
/// `x`: BF16, F16 or F32 `[.., K]`, any strides. Gives the codes, F8E4M3 `[.., K]`, and the scales, F32 `[.., 1]`.
/// See the [arithmetic](crate#arithmetic). A row with a NaN becomes NaN as a whole. No gradient passes.
///
/// # Errors
/// If `x` has no rows (rank 0 or K = 0), another dtype, or is on a [device](crate#devices) without kernels.
pub fn quantize_per_token(x: &Tensor) -> Result<(Tensor, Tensor)> {
    const OP: &str = "quantize_per_token";
    let quantized = run(OP, x, Quantization::PerToken)?;
    Ok((quantized.codes, quantized.scales))
}

/// Quantizes groups of `group` neighbours in each row of `x` with a scale of their own; the last group may be short.
///
/// `x`: BF16, F16 or F32 `[.., K]`, any strides. Gives the codes, F8E4M3 `[.., K]`, and the scales, F32
/// `[.., ceil(K / group)]`. A group with a NaN becomes NaN as a whole. No gradient passes.
///
/// # Errors
/// If `group` is 0, `x` has no rows (rank 0 or K = 0), another dtype, or is on a [device](crate#devices) without kernels.
pub fn quantize_per_group(x: &Tensor, group: usize) -> Result<(Tensor, Tensor)> {
    const OP: &str = "quantize_per_group";
    let quantized = run(OP, x, Quantization::PerGroup(group))?;
    Ok((quantized.codes, quantized.scales))
}

/// Quantizes `x` with one scale.
///
/// `x`: BF16, F16 or F32 of any shape and strides. Gives the codes, F8E4M3 of that shape, and the scale, F32 `[1]`.
/// If `x` holds a NaN, all of it becomes NaN. No gradient passes.
///
/// # Errors
/// If `x` has another dtype or is on a [device](crate#devices) without kernels.
pub fn quantize_per_tensor(x: &Tensor) -> Result<(Tensor, Tensor)> {
    const OP: &str = "quantize_per_tensor";
    let quantized = run(OP, x, Quantization::PerTensor)?;
    Ok((quantized.codes, quantized.scales))
}

/// Quantizes `x` with a scale that is given, such as a checkpoint's `input_scale`.
///
/// `x`: BF16, F16 or F32 of any shape and strides. Gives the codes, F8E4M3 of that shape: `x / scale` in f32, clamped
/// to ±448. No gradient passes.
///
/// # Errors
/// If `scale` is not positive and finite, or `x` has another dtype or is on a [device](crate#devices) without kernels.
pub fn quantize_static(x: &Tensor, scale: f32) -> Result<Tensor> {
    const OP: &str = "quantize_static";
    Ok(run(OP, x, Quantization::Static(scale))?.codes)
}

/// Quantizes `x` in any way, once for several products.
///
/// `x`: BF16, F16 or F32 `[.., K]`, any strides. No gradient passes.
///
/// # Errors
/// If a static scale is not positive and finite, a group is 0, `x` has no rows (rank 0 or K = 0) for scales of rows or
/// groups, or it has another dtype or is on a [device](crate#devices) without kernels.
pub fn quantize(x: &Tensor, quantization: Quantization) -> Result<Quantized> {
    run("quantize", x, quantization)
}

fn run(op: &'static str, x: &Tensor, quantization: Quantization) -> Result<Quantized> {
    error::quantization(op, "scale", quantization)?;
    let k = match quantization {
        Quantization::PerToken | Quantization::PerGroup(_) => error::rows(op, "x", x)?.1,
        // No scale depends on where rows end.
        Quantization::PerTensor | Quantization::Static(_) => 1,
    };
    error::float(op, "x", x.dtype())?;
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return cuda::quantize(op, x, quantization);
    }
    #[cfg(feature = "metal")]
    if x.device().is_metal() {
        return metal::quantize(op, x, quantization);
    }
    storage::on_cpu(op, x, |x_storage, layout| {
        let values = storage::values(x_storage, layout)?;
        let (codes, scales) = cpu::quantize(&values, k, quantization);
        let scales_shape = quantization.scales_shape(x.dims());
        Ok(Quantized {
            codes: storage::tensor(storage::from_codes(codes), x.dims()),
            scales: storage::tensor(CpuStorage::F32(scales), scales_shape),
            group: quantization.group(),
            dtype: x.dtype(),
        })
    })
}
