//! Quantizing on GPUs of Apple silicon.

use candle_core::backend::BackendStorage;
use candle_core::{DType, Result, Tensor};
use candle_kernels_fp8::e4m3;
use candle_kernels_fp8::metal::{self as kernels, QuantizeTensor, Slice, TENSOR_SCALES};
use candle_metal_kernels::metal::Buffer;

use crate::metal::{On, Rows, codes, float, on_metal, scale, slice, tensor};
use crate::{Quantization, Quantized};

pub(super) fn quantize(
    op: &'static str,
    x: &Tensor,
    quantization: Quantization,
) -> Result<Quantized> {
    let (storage, layout) = x.storage_and_layout();
    let storage = on_metal(&storage)?;
    let on = On::new(op, storage.device());
    let rows = Rows::of(&on, (storage, layout))?;
    if quantization == Quantization::PerTensor {
        let codes = on.alloc(x.elem_count(), DType::F8E4M3)?;
        let scales = launch_tensor(&on, &rows, slice(&codes), rows.k)?;
        return Ok(Quantized {
            codes: tensor(codes, x.shape()),
            scales,
            group: None,
            dtype: x.dtype(),
        });
    }
    codes(&on, x, quantization, |codes, quantization| {
        launch(&on, &rows, (codes, rows.k), quantization)
    })
}

/// Launches what quantizes rows; `codes` are `stride` apart, and what is between them becomes zero.
pub(crate) fn launch(
    on: &On<'_>,
    x: &Rows<'_>,
    (codes, codes_stride): (Slice<'_, Buffer>, usize),
    quantization: kernels::Quantization<'_, Buffer>,
) -> Result<()> {
    if x.m == 0 || x.k == 0 {
        return Ok(());
    }
    let args = kernels::Quantize {
        m: x.m,
        k: x.k,
        x: x.slice(),
        float: float(x.dtype())?,
        row_stride: x.stride,
        codes,
        codes_stride,
        quantization,
    };
    kernels::quantize(on, &args)
}

/// As [`launch`], with one scale for all, which it gives.
pub(crate) fn launch_tensor(
    on: &On<'_>,
    x: &Rows<'_>,
    codes: Slice<'_, Buffer>,
    codes_stride: usize,
) -> Result<Tensor> {
    if x.m == 0 || x.k == 0 {
        // That of no values is that of zeros; no kernel looks at them.
        return scale(on, 1.0 / e4m3::MAX);
    }
    let scales = on.alloc(TENSOR_SCALES, DType::F32)?;
    let args = QuantizeTensor {
        m: x.m,
        k: x.k,
        x: x.slice(),
        float: float(x.dtype())?,
        row_stride: x.stride,
        codes,
        codes_stride,
        scales: slice(&scales),
    };
    kernels::quantize_tensor(on, &args)?;
    tensor(scales, TENSOR_SCALES).narrow(0, TENSOR_SCALES - 1, 1)
}
