//! Codes and scales back to a dense weight.

#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "metal")]
mod metal;

use candle_core::{CpuStorage, DType, Device, Result, Tensor};
use candle_kernels_fp8::cpu::{self, Element};
use half::{bf16, f16};

use crate::ScaleLayout;
use crate::error;
use crate::storage;

const OP: &str = "dequantize";

/// Folds the scales into a weight: bit for bit what compressed-tensors does on the CPU.
///
/// `codes`: F8E4M3 `[N, K]`. `scale`: as `layout` says, in `scale_dtype`, or in F32 holding values of `scale_dtype`.
/// Gives `[N, K]` in `dtype`: the codes in `scale_dtype` (exact) times the scale, rounded in `scale_dtype`, then cast.
/// Both dtypes are one of BF16, F16 and F32.
///
/// # Errors
/// If a dtype is another, the scale's shape is not the layout's, or the tensors are on a [device](crate#devices) without
/// kernels.
pub fn dequantize(
    codes: &Tensor,
    scale: &Tensor,
    layout: ScaleLayout,
    scale_dtype: DType,
    dtype: DType,
) -> Result<Tensor> {
    error::codes(OP, "codes", codes.dtype())?;
    error::float(OP, "scale_dtype", scale_dtype)?;
    error::float(OP, "the result", dtype)?;
    error::dtype(
        OP,
        "weight_scale",
        scale.dtype(),
        &[scale_dtype, DType::F32],
        "scale_dtype or F32",
    )?;
    let (n, k) = error::weight_dims(OP, "codes", codes)?;
    error::weight_scale(OP, scale, layout, n, k)?;
    error::device(OP, "weight_scale", scale, codes.device())?;

    #[cfg(any(feature = "cuda", feature = "metal"))]
    let how = How {
        layout,
        scale_dtype,
        dtype,
    };
    #[cfg(feature = "cuda")]
    if codes.device().is_cuda() {
        return cuda::dequantize(codes, &scale.to_dtype(DType::F32)?, how);
    }
    #[cfg(feature = "metal")]
    if codes.device().is_metal() {
        return metal::dequantize(codes, &scale.to_dtype(DType::F32)?, how);
    }
    let scales = storage::on_cpu(OP, scale, |storage, layout| {
        Ok(storage::values(storage, layout)?.into_owned())
    })?;
    let dense = storage::on_cpu(OP, codes, |storage, codes_layout| {
        let codes = storage::codes(storage, codes_layout)?;
        let weight = Weight {
            codes: &codes,
            k,
            scales: &scales,
            layout,
        };
        Ok(weight.dequantize(scale_dtype, dtype))
    })?;
    Ok(storage::tensor(dense, (n, k)))
}

/// As [`dequantize`], from codes that are not a tensor yet, such as those of a memory-mapped file: the result is the
/// only copy on the host. On CUDA and Metal there is none: the codes are sent, and dequantized there.
///
/// `codes`: `n · k` bytes for a weight of `shape` `(n, k)`. `scale`: values of `scale_dtype`, in the order of
/// `layout`. Gives `[n, k]` in `dtype` on `device`, which may be any: where it has no [kernels](crate::fp8_kernels), the
/// host dequantizes.
///
/// # Errors
/// If a dtype is not one of BF16, F16 and F32, or a length does not fit the shape.
pub fn dequantize_bytes(
    codes: &[u8],
    (n, k): (usize, usize),
    scale: &[f32],
    layout: ScaleLayout,
    scale_dtype: DType,
    dtype: DType,
    device: &Device,
) -> Result<Tensor> {
    error::float(OP, "scale_dtype", scale_dtype)?;
    error::float(OP, "the result", dtype)?;
    error::block(OP, layout)?;
    error::length(OP, "codes", codes.len(), n.saturating_mul(k))?;
    error::length(OP, "weight_scale", scale.len(), layout.len(n, k))?;
    if codes.is_empty() {
        return Tensor::zeros((n, k), dtype, device);
    }
    #[cfg(any(feature = "cuda", feature = "metal"))]
    let how = How {
        layout,
        scale_dtype,
        dtype,
    };
    #[cfg(feature = "cuda")]
    if let Device::Cuda(gpu) = device
        && crate::fp8_kernels(device)
    {
        return cuda::dequantize_bytes(gpu, codes, (n, k), scale, how);
    }
    #[cfg(feature = "metal")]
    if let Device::Metal(gpu) = device
        && crate::fp8_kernels(device)
    {
        return metal::dequantize_bytes(gpu, codes, (n, k), scale, how);
    }
    let weight = Weight {
        codes,
        k,
        scales: scale,
        layout,
    };
    storage::tensor(weight.dequantize(scale_dtype, dtype), (n, k)).to_device(device)
}

/// What a weight is dequantized to, and through.
#[cfg(any(feature = "cuda", feature = "metal"))]
#[derive(Clone, Copy)]
struct How {
    layout: ScaleLayout,
    scale_dtype: DType,
    dtype: DType,
}

struct Weight<'a> {
    codes: &'a [u8],
    k: usize,
    scales: &'a [f32],
    layout: ScaleLayout,
}

impl Weight<'_> {
    fn dequantize(&self, scale_dtype: DType, dtype: DType) -> CpuStorage {
        match scale_dtype {
            DType::BF16 => self.through::<bf16>(dtype),
            DType::F16 => self.through::<f16>(dtype),
            _ => self.through::<f32>(dtype),
        }
    }

    fn through<S: Element>(&self, dtype: DType) -> CpuStorage {
        match dtype {
            DType::BF16 => CpuStorage::BF16(self.dense::<S, bf16>(bf16::ZERO)),
            DType::F16 => CpuStorage::F16(self.dense::<S, f16>(f16::ZERO)),
            _ => CpuStorage::F32(self.dense::<S, f32>(0.0)),
        }
    }

    fn dense<S: Element, T: Element>(&self, zero: T) -> Vec<T> {
        let mut out = vec![zero; self.codes.len()];
        cpu::dequantize::<S, T>(self.codes, self.k, self.scales, self.layout, &mut out);
        out
    }
}
