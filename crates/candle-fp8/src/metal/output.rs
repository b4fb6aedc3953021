//! What kernels write: values, or codes and scales.

use candle_core::op::BackpropOp;
use candle_core::{DType, MetalStorage, Result, Shape, Storage, Tensor, bail};
use candle_kernels_fp8::metal::{self as kernels, Output, Slice};
use candle_metal_kernels::metal::Buffer;

use super::{On, slice};
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

/// Codes of activations `[.., K]`, dense, and their scales: `write` gets where the codes go, and how they are quantized.
pub(crate) fn codes(
    on: &On<'_>,
    like: &Tensor,
    quantization: Quantization,
    write: impl FnOnce(Slice<'_, Buffer>, kernels::Quantization<'_, Buffer>) -> Result<()>,
) -> Result<Quantized> {
    let shape = quantization.scales_shape(like.dims());
    let codes = on.alloc(like.elem_count(), DType::F8E4M3)?;
    let room = || on.alloc(shape.iter().product(), DType::F32);
    let scales = match quantization {
        Quantization::Static(value) => {
            write(
                slice(&codes),
                kernels::Quantization::Static { scale: value },
            )?;
            scale(on, value)?
        }
        Quantization::PerToken => {
            let room = room()?;
            let scales = slice(&room);
            write(slice(&codes), kernels::Quantization::Token { scales })?;
            tensor(room, shape)
        }
        Quantization::PerGroup(group) => {
            let room = room()?;
            let scales = slice(&room);
            write(
                slice(&codes),
                kernels::Quantization::Group { group, scales },
            )?;
            tensor(room, shape)
        }
        Quantization::PerTensor => bail!("one scale for all rows is not known before them"),
    };
    Ok(Quantized {
        codes: tensor(codes, like.shape()),
        scales,
        group: quantization.group(),
        dtype: like.dtype(),
    })
}

fn columns(tensor: &Tensor) -> usize {
    tensor.dims().last().copied().unwrap_or(1)
}
