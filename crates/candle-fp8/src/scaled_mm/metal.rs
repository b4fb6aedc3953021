//! The products on GPUs of Apple silicon.

use candle_core::backend::BackendStorage;
use candle_core::{DType, MetalStorage, Result, Tensor};
use candle_kernels_fp8::metal::{self as kernels, Activations};
use candle_metal_kernels::metal::Buffer;

use super::{Input, Mode, OP, ScaledMm, Weight};
use crate::Quantization;
use crate::metal::{On, Rows, View, float, of_rows, on_metal, slice, tensor};
use crate::quantize::metal as quantize;

/// One weight's product.
pub(super) fn one(
    op: &ScaledMm,
    x: View<'_>,
    weight: View<'_>,
    scale: View<'_>,
) -> Result<MetalStorage> {
    let on = On::new(OP, x.0.device());
    with_operand(&on, op, x, |x| product(&on, op, x, weight, scale))
}

/// Products of one input with several weights; checks them. The input is quantized once.
pub(super) fn many(x: &Tensor, input: Input<'_>, weights: &[Weight<'_>]) -> Result<Vec<Tensor>> {
    let ops = weights
        .iter()
        .map(|w| ScaledMm::check(input, w.codes, w.scale, w.layout, w.bias))
        .collect::<Result<Vec<_>>>()?;
    let (Some(op), (x, x_layout)) = (ops.first(), x.storage_and_layout()) else {
        return Ok(Vec::new());
    };
    let x = (on_metal(&x)?, x_layout);
    let on = On::new(OP, x.0.device());
    with_operand(&on, op, x, |x| {
        let products = ops.iter().zip(weights).map(|(op, w)| {
            let (weight, weight_layout) = w.codes.tensor().storage_and_layout();
            let (scale, scale_layout) = w.scale.storage_and_layout();
            let weight = (on_metal(&weight)?, weight_layout);
            let scale = (on_metal(&scale)?, scale_layout);
            let out = product(&on, op, x, weight, scale)?;
            Ok(tensor(out, op.shape.clone()))
        });
        products.collect()
    })
}

/// Activations as kernels take them.
#[derive(Clone, Copy)]
struct Operand<'a> {
    activations: Activations<'a, Buffer>,
    /// Elements from one row to the next.
    stride: usize,
}

/// Calls `f` with the activations, which are the same for all weights: quantized if they are to be.
fn with_operand<T>(
    on: &On<'_>,
    op: &ScaledMm,
    x: View<'_>,
    f: impl FnOnce(Operand<'_>) -> Result<T>,
) -> Result<T> {
    let rows = Rows::of(on, x)?;
    match &op.mode {
        Mode::Full => f(Operand {
            activations: Activations::Values {
                values: rows.slice(),
                float: float(rows.dtype())?,
            },
            stride: rows.stride,
        }),
        Mode::Quantize(quantization) => {
            let scaling = quantization.scaling();
            // Rows are read at once where they start at multiples of 16 bytes.
            let stride = kernels::padded(op.k);
            let codes = on.alloc(op.m * stride, DType::F8E4M3)?;
            let to = (slice(&codes), stride);
            let operand = |scales| {
                f(Operand {
                    activations: Activations::Codes {
                        codes: to.0,
                        scales,
                        scaling,
                    },
                    stride,
                })
            };
            if let Quantization::PerTensor = quantization {
                let scale = quantize::launch_tensor(on, &rows, to.0, stride)?;
                let (scale, layout) = scale.storage_and_layout();
                return operand(Rows::flat(on, (on_metal(&scale)?, layout))?.slice());
            }
            let scales = on.alloc(scaling.len(op.m, op.k), DType::F32)?;
            let scales = slice(&scales);
            quantize::launch(on, &rows, to, of_rows(*quantization, scales)?)?;
            operand(scales)
        }
        Mode::Codes { scales, scaling } => {
            let (scales, scales_layout) = scales.storage_and_layout();
            let scales = Rows::flat(on, (on_metal(&scales)?, scales_layout))?;
            f(Operand {
                activations: Activations::Codes {
                    codes: rows.slice(),
                    scales: scales.slice(),
                    scaling: *scaling,
                },
                stride: rows.stride,
            })
        }
    }
}

fn product(
    on: &On<'_>,
    op: &ScaledMm,
    x: Operand<'_>,
    weight: View<'_>,
    scale: View<'_>,
) -> Result<MetalStorage> {
    let out = on.alloc(op.m * op.n, op.dtype)?;
    let weight = Rows::of(on, weight)?;
    let scale = Rows::flat(on, scale)?;
    let bias = op.bias.as_ref().map(Tensor::storage_and_layout);
    let bias = match &bias {
        Some((storage, layout)) => Some(Rows::flat(on, (on_metal(storage)?, layout))?),
        None => None,
    };
    let bias = match &bias {
        Some(bias) => Some((bias.slice(), float(bias.dtype())?)),
        None => None,
    };
    let args = kernels::ScaledMm {
        m: op.m,
        n: op.n,
        k: op.k,
        activations: x.activations,
        row_stride: x.stride,
        weight: weight.slice(),
        weight_stride: weight.stride,
        weight_scales: scale.slice(),
        layout: op.layout,
        bias,
        out: slice(&out),
        out_float: float(op.dtype)?,
    };
    kernels::scaled_mm(on, &args)?;
    Ok(out)
}
