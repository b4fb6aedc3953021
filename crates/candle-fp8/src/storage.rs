//! Between Candle's CPU storage and the kernels' slices.

use candle_core::backend::BackendStorage;
use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, DType, Layout, Result, Shape, Storage, Tensor, bail};
use candle_kernels_fp8::cpu::Element;
use float8::F8E4M3;
use half::{bf16, f16};
use std::borrow::Cow;

use crate::error;

/// Where a layout's elements lie in its storage, in row-major order.
pub(crate) fn offsets(layout: &Layout) -> impl Iterator<Item = usize> + '_ {
    let (dims, strides) = (layout.dims(), layout.stride());
    let mut index = vec![0usize; dims.len()];
    let mut next = layout.start_offset();
    (0..layout.shape().elem_count()).map(move |_| {
        let offset = next;
        for axis in (0..dims.len()).rev() {
            index[axis] += 1;
            next += strides[axis];
            if index[axis] < dims[axis] {
                break;
            }
            next -= dims[axis] * strides[axis];
            index[axis] = 0;
        }
        offset
    })
}

/// The values that a layout selects, in row-major order: borrowed where they lie so, else copied.
fn dense<'a, T: Copy>(values: &'a [T], layout: &Layout) -> Cow<'a, [T]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Cow::Borrowed(&values[start..end]),
        None => offsets(layout).map(|i| values[i]).collect(),
    }
}

fn widened<T: Element>(values: &[T], layout: &Layout) -> Vec<f32> {
    match layout.contiguous_offsets() {
        Some((start, end)) => values[start..end].iter().map(|v| v.to_f32()).collect(),
        None => offsets(layout).map(|i| values[i].to_f32()).collect(),
    }
}

/// A BF16, F16 or F32 tensor's values, exactly.
pub(crate) fn values<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<Cow<'a, [f32]>> {
    Ok(match storage {
        CpuStorage::F32(values) => dense(values, layout),
        CpuStorage::F16(values) => Cow::Owned(widened::<f16>(values, layout)),
        CpuStorage::BF16(values) => Cow::Owned(widened::<bf16>(values, layout)),
        other => bail!("no float values in a {:?} tensor", other.dtype()),
    })
}

/// A BF16 tensor's values.
pub(crate) fn bf16<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<Cow<'a, [bf16]>> {
    let CpuStorage::BF16(values) = storage else {
        bail!("no BF16 values in a {:?} tensor", storage.dtype());
    };
    Ok(dense(values, layout))
}

/// An F8E4M3 tensor's codes.
pub(crate) fn codes<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<Cow<'a, [u8]>> {
    let CpuStorage::F8E4M3(codes) = storage else {
        bail!("no FP8 codes in a {:?} tensor", storage.dtype());
    };
    // SAFETY: `F8E4M3` is `repr(transparent)` over `u8`, so the bytes, their number and their lifetime are the same.
    let bytes = unsafe { std::slice::from_raw_parts(codes.as_ptr().cast::<u8>(), codes.len()) };
    Ok(dense(bytes, layout))
}

/// Codes as storage. Reuses the allocation.
pub(crate) fn from_codes(codes: Vec<u8>) -> CpuStorage {
    CpuStorage::F8E4M3(codes.into_iter().map(F8E4M3::from_bits).collect())
}

/// Values rounded to a float dtype, to nearest, ties to even.
pub(crate) fn from_values(values: Vec<f32>, dtype: DType) -> Result<CpuStorage> {
    Ok(match dtype {
        DType::F32 => CpuStorage::F32(values),
        DType::F16 => CpuStorage::F16(values.into_iter().map(f16::from_f32).collect()),
        DType::BF16 => CpuStorage::BF16(values.into_iter().map(bf16::from_f32).collect()),
        other => bail!("cannot make a {other:?} tensor of float values"),
    })
}

/// Values rounded to a float dtype and back.
pub(crate) fn round(values: &mut [f32], dtype: DType) {
    match dtype {
        DType::F16 => values
            .iter_mut()
            .for_each(|v| *v = f16::from_f32(*v).to_f32()),
        DType::BF16 => values
            .iter_mut()
            .for_each(|v| *v = bf16::from_f32(*v).to_f32()),
        _ => {}
    }
}

/// A tensor that no gradient passes.
pub(crate) fn tensor(storage: CpuStorage, shape: impl Into<Shape>) -> Tensor {
    Tensor::from_storage(Storage::Cpu(storage), shape, BackpropOp::none(), false)
}

/// Runs `f` on a tensor's CPU storage; refuses other devices in the op's name.
pub(crate) fn on_cpu<T>(
    op: &'static str,
    tensor: &Tensor,
    f: impl FnOnce(&CpuStorage, &Layout) -> Result<T>,
) -> Result<T> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => f(storage, layout),
        _ => Err(error::no_kernel(op, tensor).into()),
    }
}
