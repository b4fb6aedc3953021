//! Stored values to tensors, without a copy in between.

use candle_core::{DType, Device, Tensor, WithDType, safetensors::Load};
use float8::F8E4M3;
use half::{bf16, f16};
use safetensors::{Dtype, tensor::TensorView};

/// The values of `view` as a tensor of `dtype`: one owned copy on the CPU, made straight from the mapped bytes. On CUDA
/// the bytes are sent from where they are mapped, unless they are of another dtype.
///
/// Rounds to nearest, ties to even, where `dtype` is narrower.
pub(crate) fn load(
    view: &TensorView<'_>,
    dtype: DType,
    device: &Device,
) -> candle_core::Result<Tensor> {
    let stored = DType::try_from(view.dtype())?;
    if stored == dtype
        && let Some(tensor) = candle_fp8::from_bytes(view.data(), view.shape(), dtype, device)?
    {
        return Ok(tensor);
    }
    match (stored, dtype) {
        (DType::F32, DType::BF16) => cast(view, |b| bf16::from_f32(f32::from_le_bytes(b)), device),
        (DType::F32, DType::F16) => cast(view, |b| f16::from_f32(f32::from_le_bytes(b)), device),
        (DType::BF16, DType::F32) => cast(view, |b| bf16::from_le_bytes(b).to_f32(), device),
        (DType::BF16, DType::F16) => cast(
            view,
            |b| f16::from_f32(bf16::from_le_bytes(b).to_f32()),
            device,
        ),
        (DType::F16, DType::F32) => cast(view, |b| f16::from_le_bytes(b).to_f32(), device),
        (DType::F16, DType::BF16) => cast(
            view,
            |b| bf16::from_f32(f16::from_le_bytes(b).to_f32()),
            device,
        ),
        // Candle's own loader copies twice what does not lie aligned in the file.
        (DType::BF16, DType::BF16) => cast(view, bf16::from_le_bytes, device),
        (DType::F16, DType::F16) => cast(view, f16::from_le_bytes, device),
        (DType::F32, DType::F32) => cast(view, f32::from_le_bytes, device),
        // Buffers of integers and the like: small, so that the copy in the stored dtype does not count.
        _ => view.load(&Device::Cpu)?.to_dtype(dtype)?.to_device(device),
    }
}

/// The E4M3 codes of `view`: one owned copy.
pub(crate) fn codes(view: &TensorView<'_>, device: &Device) -> candle_core::Result<Tensor> {
    let (bytes, dtype) = (view.data(), DType::F8E4M3);
    if let Some(codes) = candle_fp8::from_bytes(bytes, view.shape(), dtype, device)? {
        return Ok(codes);
    }
    cast(view, |[code]: [u8; 1]| F8E4M3::from_bits(code), device)
}

fn cast<const SIZE: usize, T: WithDType>(
    view: &TensorView<'_>,
    value: impl Fn([u8; SIZE]) -> T,
    device: &Device,
) -> candle_core::Result<Tensor> {
    let (elements, _) = view.data().as_chunks::<SIZE>();
    let values: Vec<T> = elements.iter().map(|bytes| value(*bytes)).collect();
    Tensor::from_vec(values, view.shape(), device)
}

/// The values of a small floating-point tensor, such as a scale, as f32 (exact for BF16, F16 and F32); `None` for
/// other dtypes.
pub(crate) fn floats(view: &TensorView<'_>) -> Option<Vec<f32>> {
    fn all<const SIZE: usize>(bytes: &[u8], value: impl Fn([u8; SIZE]) -> f32) -> Option<Vec<f32>> {
        Some(
            bytes
                .as_chunks::<SIZE>()
                .0
                .iter()
                .map(|bytes| value(*bytes))
                .collect(),
        )
    }
    match view.dtype() {
        Dtype::F32 => all(view.data(), f32::from_le_bytes),
        Dtype::BF16 => all(view.data(), |b| bf16::from_le_bytes(b).to_f32()),
        Dtype::F16 => all(view.data(), |b| f16::from_le_bytes(b).to_f32()),
        _ => None,
    }
}

/// How many elements of two tensors of one size and dtype differ. NaN differs from everything.
pub(crate) fn count_different(a: &Tensor, b: &Tensor) -> candle_core::Result<usize> {
    let differ = a.flatten_all()?.ne(&b.flatten_all()?)?.to_vec1::<u8>()?;
    Ok(differ.into_iter().filter(|differs| *differs != 0).count())
}
