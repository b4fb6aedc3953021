//! What kernels write: values, or codes and scales.

use candle_core::op::BackpropOp;
use candle_core::{DType, MetalStorage, Result, Shape, Storage, Tensor, bail};
use candle_kernels_fp8::metal::{self as kernels, Output, Slice};
use candle_metal_kernels::metal::Buffer;

use super::{On, slice};
use crate::gpu::columns;
use crate::{Quantization, Quantized};

/// A tensor that no gradient passes.
pub(crate) fn tensor(storage: MetalStorage, shape: impl Into<Shape>) -> Tensor {
    Tensor::from_storage(Storage::Metal(storage), shape, BackpropOp::none(), false)
}

/// A scale as a tensor `[1]`.
pub(crate) fn scale(on: &On<'_>, value: f32) -> Result<Tensor> {
    Ok(tensor(on.upload(&[value], DType::F32)?, 1))
}

/// What is made of activations `[.., K]` that a kernel computes.
pub(crate) trait Destination {
    /// What it gives.
    type Made;

    /// Launches a kernel whose result is of the shape and dtype of a tensor.
    fn make(
        self,
        on: &On<'_>,
        like: &Tensor,
        launch: impl FnOnce(Output<'_, Buffer>) -> Result<()>,
    ) -> Result<Self::Made>;
}

/// They stay as they are.
pub(crate) struct Values;

impl Destination for Values {
    type Made = Tensor;

    fn make(
        self,
        on: &On<'_>,
        like: &Tensor,
        launch: impl FnOnce(Output<'_, Buffer>) -> Result<()>,
    ) -> Result<Tensor> {
        let out = on.alloc(like.elem_count(), like.dtype())?;
        launch(Output::Values {
            values: slice(&out),
            stride: columns(like),
        })?;
        Ok(tensor(out, like.shape()))
    }
}

impl Destination for Quantization {
    type Made = Quantized;

    fn make(
        self,
        on: &On<'_>,
        like: &Tensor,
        launch: impl FnOnce(Output<'_, Buffer>) -> Result<()>,
    ) -> Result<Quantized> {
        codes(on, like, self, |codes, quantization| {
            launch(Output::Codes {
                codes,
                stride: columns(like),
                quantization,
            })
        })
    }
}

/// Codes of activations `[.., K]`, dense, and their scales: `write` gets where the codes go, and how they are
/// quantized.
pub(crate) fn codes(
    on: &On<'_>,
    like: &Tensor,
    quantization: Quantization,
    write: impl FnOnce(Slice<'_, Buffer>, kernels::Quantization<'_, Buffer>) -> Result<()>,
) -> Result<Quantized> {
    let shape = quantization.scales_shape(like.dims());
    let codes = on.alloc(like.elem_count(), DType::F8E4M3)?;
    let scales = on.alloc(shape.iter().product(), DType::F32)?;
    write(slice(&codes), of_rows(quantization, slice(&scales))?)?;
    let scales = match quantization {
        // Without rows, no kernel writes it down.
        Quantization::Static(value) if like.elem_count() == 0 => scale(on, value)?,
        _ => tensor(scales, shape),
    };
    Ok(Quantized {
        codes: tensor(codes, like.shape()),
        scales,
        group: quantization.group(),
        dtype: like.dtype(),
    })
}

/// A quantization of rows, as kernels know it.
pub(crate) fn of_rows<'a>(
    quantization: Quantization,
    scales: Slice<'a, Buffer>,
) -> Result<kernels::Quantization<'a, Buffer>> {
    Ok(match quantization {
        Quantization::PerToken => kernels::Quantization::Token { scales },
        Quantization::PerGroup(group) => kernels::Quantization::Group { group, scales },
        Quantization::Static(scale) => kernels::Quantization::Static { scale, scales },
        Quantization::PerTensor => bail!("one scale for all rows is not known before them"),
    })
}
