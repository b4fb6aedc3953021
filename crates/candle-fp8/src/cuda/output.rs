//! What kernels write: values, or codes and scales.

use candle_core::op::BackpropOp;
use candle_core::{CudaStorage, DType, Result, Shape, Storage, Tensor, bail};
use candle_kernels_fp8::cuda::{self as kernels, Address, Output};

use super::{KernelResult, On, writes};
use crate::gpu::columns;
use crate::{Quantization, Quantized};

/// A tensor that no gradient passes.
pub(crate) fn tensor(storage: CudaStorage, shape: impl Into<Shape>) -> Tensor {
    Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false)
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
        launch: impl FnOnce(Output) -> KernelResult,
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
        launch: impl FnOnce(Output) -> KernelResult,
    ) -> Result<Tensor> {
        let mut out = on.alloc(like.elem_count(), like.dtype())?;
        {
            let out = writes(&mut out, on.stream())?;
            on.launched(launch(Output::Values {
                values: out.address,
                stride: columns(like),
            }))?;
        }
        Ok(tensor(out, like.shape()))
    }
}

impl Destination for Quantization {
    type Made = Quantized;

    fn make(
        self,
        on: &On<'_>,
        like: &Tensor,
        launch: impl FnOnce(Output) -> KernelResult,
    ) -> Result<Quantized> {
        let k = columns(like);
        codes(on, like, self, |codes, scales| {
            let quantization = match self {
                Self::PerToken => kernels::Quantization::Token { scales },
                Self::PerGroup(group) => kernels::Quantization::Group {
                    group: group.min(k),
                    scales,
                },
                Self::Static(scale) => {
                    // SAFETY: there is one scale.
                    unsafe { on.write(scales, scale) }?;
                    kernels::Quantization::Static { scale }
                }
                Self::PerTensor => bail!("one scale for all rows is not known before them"),
            };
            on.launched(launch(Output::Codes {
                codes,
                stride: k,
                quantization,
            }))
        })
    }
}

/// Codes of activations `[.., K]`, dense, and their scales: `write` gets the addresses of both.
pub(crate) fn codes(
    on: &On<'_>,
    like: &Tensor,
    quantization: Quantization,
    write: impl FnOnce(Address, Address) -> Result<()>,
) -> Result<Quantized> {
    let shape = quantization.scales_shape(like.dims());
    let mut codes = on.alloc(like.elem_count(), DType::F8E4M3)?;
    let mut scales = on.alloc(shape.iter().product(), DType::F32)?;
    {
        let codes = writes(&mut codes, on.stream())?;
        let scales = writes(&mut scales, on.stream())?;
        write(codes.address, scales.address)?;
    }
    Ok(Quantized {
        codes: tensor(codes, like.shape()),
        scales: tensor(scales, shape),
        group: quantization.group(),
        dtype: like.dtype(),
    })
}
