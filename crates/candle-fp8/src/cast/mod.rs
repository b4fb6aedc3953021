//! E4M3 to other floats and back, without a scale.

#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "metal")]
mod metal;

use candle_core::{CpuStorage, DType, Result, Tensor};
use candle_kernels_fp8::ScaleLayout;
use candle_kernels_fp8::cpu::{self, Element};
use half::{bf16, f16};

use crate::error;
use crate::storage;

const OP: &str = "cast";

/// Casts between F8E4M3 and BF16, F16 or F32, which Candle itself cannot on CUDA and Metal.
///
/// `x`: one of these dtypes, of any shape and strides. Gives that shape in `dtype`. To F8E4M3, values are rounded to
/// nearest, ties to even, and clamped to ±448; NaN stays NaN. From it, casts are exact; so BF16, F16 and F32 hold all
/// codes. No gradient passes a cast from or to F8E4M3; casts between the others are those of Candle.
///
/// # Errors
/// If a dtype is another, or `x` is on a [device](crate#devices) without kernels.
pub fn cast(x: &Tensor, dtype: DType) -> Result<Tensor> {
    const EXPECTED: &str = "F8E4M3, BF16, F16 or F32";
    let known = [DType::F8E4M3, DType::BF16, DType::F16, DType::F32];
    error::dtype(OP, "x", x.dtype(), &known, EXPECTED)?;
    error::dtype(OP, "the result", dtype, &known, EXPECTED)?;
    if x.dtype() == dtype {
        return Ok(x.clone());
    }
    if x.dtype() != DType::F8E4M3 && dtype != DType::F8E4M3 {
        return x.to_dtype(dtype);
    }
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return cuda::cast(x, dtype);
    }
    #[cfg(feature = "metal")]
    if x.device().is_metal() {
        return metal::cast(x, dtype);
    }
    storage::on_cpu(OP, x, |x_storage, layout| {
        if dtype == DType::F8E4M3 {
            let values = storage::values(x_storage, layout)?;
            let mut codes = vec![0u8; values.len()];
            // Divided by one: as they are.
            cpu::quantize_static(&values, 1.0, &mut codes);
            return Ok(storage::tensor(storage::from_codes(codes), x.shape()));
        }
        let codes = storage::codes(x_storage, layout)?;
        let values = match dtype {
            DType::BF16 => CpuStorage::BF16(decoded(&codes, bf16::ZERO)),
            DType::F16 => CpuStorage::F16(decoded(&codes, f16::ZERO)),
            _ => CpuStorage::F32(decoded(&codes, 0.0)),
        };
        Ok(storage::tensor(values, x.shape()))
    })
}

/// Codes times one.
fn decoded<T: Element>(codes: &[u8], zero: T) -> Vec<T> {
    let mut values = vec![zero; codes.len()];
    let (k, layout) = (codes.len().max(1), ScaleLayout::Tensor);
    cpu::dequantize::<f32, T>(codes, k, &[1.0], layout, &mut values);
    values
}
