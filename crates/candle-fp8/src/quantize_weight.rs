//! Dense weights to E4M3, as compressed-tensors writes them.

use candle_core::{CpuStorage, DType, Device, Result, Tensor};
use candle_kernels_fp8::cpu;
use half::{bf16, f16};

use crate::ScaleLayout;
use crate::error;
use crate::storage;

/// How often the quotient of weight and scale is rounded on its way to a code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Rounding {
    /// As compressed-tensors on the CPU: the quotient is rounded to the weight's dtype, which its scales normally share,
    /// then to E4M3.
    ViaScaleDtype,
    /// As compressed-tensors 0.18 and later on CUDA: the f32 quotient is rounded to E4M3.
    Once,
}

/// The scales that compressed-tensors gives a weight.
///
/// `w`: BF16, F16 or F32 `[N, K]`. Gives F32 of the layout's shape, holding values of `scale_dtype` (BF16, F16 or F32):
/// `amax / 448` in f32, rounded to `scale_dtype`; where that is 0, the `eps` of `scale_dtype`. They are computed on the
/// CPU: a weight of another device is copied there, and the scales back.
///
/// # Errors
/// If a dtype is another, `w` is not `[N, K]`, or a block is 0 wide.
pub fn weight_scale(w: &Tensor, layout: ScaleLayout, scale_dtype: DType) -> Result<Tensor> {
    const OP: &str = "weight_scale";
    error::float(OP, "w", w.dtype())?;
    error::float(OP, "scale_dtype", scale_dtype)?;
    error::block(OP, layout)?;
    let (n, k) = error::weight_dims(OP, "w", w)?;
    let device = w.device();
    let w = &w.to_device(&Device::Cpu)?;
    let mut scales = storage::on_cpu(OP, w, |w_storage, w_layout| {
        let values = storage::values(w_storage, w_layout)?;
        Ok(cpu::weight_amax(&values, k, layout))
    })?;
    for scale in &mut scales {
        *scale /= candle_kernels_fp8::e4m3::MAX;
    }
    storage::round(&mut scales, scale_dtype);
    let eps = match scale_dtype {
        DType::BF16 => bf16::EPSILON.to_f32(),
        DType::F16 => f16::EPSILON.to_f32(),
        _ => f32::EPSILON,
    };
    for scale in &mut scales {
        if *scale == 0.0 {
            *scale = eps;
        }
    }
    storage::tensor(CpuStorage::F32(scales), layout.shape(n, k)).to_device(device)
}

/// The codes that compressed-tensors gives a weight.
///
/// `w`: BF16, F16 or F32 `[N, K]`. `scale`: F32, or `w`'s dtype, in the layout's shape. Gives F8E4M3 `[N, K]`. They are
/// computed on the CPU: a weight of another device is copied there, and the codes back.
///
/// # Errors
/// If a dtype is another, or the scale's shape is not the layout's.
pub fn quantize_weight(
    w: &Tensor,
    scale: &Tensor,
    layout: ScaleLayout,
    rounding: Rounding,
) -> Result<Tensor> {
    const OP: &str = "quantize_weight";
    error::float(OP, "w", w.dtype())?;
    error::dtype(
        OP,
        "weight_scale",
        scale.dtype(),
        &[DType::F32, w.dtype()],
        "F32 or the weight's dtype",
    )?;
    let (n, k) = error::weight_dims(OP, "w", w)?;
    error::weight_scale(OP, scale, layout, n, k)?;
    error::device(OP, "weight_scale", scale, w.device())?;
    let device = w.device();
    let (w, scale) = (&w.to_device(&Device::Cpu)?, &scale.to_device(&Device::Cpu)?);
    let scales = storage::on_cpu(OP, scale, |storage, layout| {
        Ok(storage::values(storage, layout)?.into_owned())
    })?;
    let codes = storage::on_cpu(OP, w, |w_storage, w_layout| {
        let values = storage::values(w_storage, w_layout)?;
        let mut codes = vec![0u8; n * k];
        let quantize = match (rounding, w.dtype()) {
            (Rounding::ViaScaleDtype, DType::BF16) => cpu::quantize_weight::<bf16>,
            (Rounding::ViaScaleDtype, DType::F16) => cpu::quantize_weight::<f16>,
            _ => cpu::quantize_weight::<f32>,
        };
        quantize(&values, k, &scales, layout, &mut codes);
        Ok(codes)
    })?;
    storage::tensor(storage::from_codes(codes), (n, k)).to_device(device)
}
