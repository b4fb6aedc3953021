//! The products on NVIDIA GPUs.

use candle_core::{CudaStorage, DType, Result, Tensor};
use candle_kernels_fp8::cuda::{self as kernels, Activations, WeightLayout};

use super::{Input, Mode, OP, ScaledMm, Weight};
use crate::cuda::{On, Rows, View, float, on_cuda, tensor, writes};
use crate::quantize::cuda as quantize;

/// One weight's product.
pub(super) fn one(
    op: &ScaledMm,
    x: View<'_>,
    weight: View<'_>,
    scale: View<'_>,
) -> Result<CudaStorage> {
    let on = On::new(OP, &x.0.device);
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
    let x = (on_cuda(&x)?, x_layout);
    let on = On::new(OP, &x.0.device);
    with_operand(&on, op, x, |x| {
        let products = ops.iter().zip(weights).map(|(op, w)| {
            let (weight, weight_layout) = w.codes.tensor().storage_and_layout();
            let (scale, scale_layout) = w.scale.storage_and_layout();
            let weight = (on_cuda(&weight)?, weight_layout);
            let scale = (on_cuda(&scale)?, scale_layout);
            let out = product(&on, op, x, weight, scale)?;
            Ok(tensor(out, op.shape.clone()))
        });
        products.collect()
    })
}

/// Activations as kernels take them.
#[derive(Clone, Copy)]
struct Operand {
    activations: Activations,
    /// Elements from one row to the next.
    stride: usize,
}

/// Calls `f` with the activations, which are the same for all weights: quantized if they are to be, with rows that start
/// at multiples of 16 bytes, and, if they are codes, nothing but zeros between them.
fn with_operand<T>(
    on: &On<'_>,
    op: &ScaledMm,
    x: View<'_>,
    f: impl FnOnce(Operand) -> Result<T>,
) -> Result<T> {
    match &op.mode {
        Mode::Full => {
            let rows = Rows::of(on, x)?.aligned(on)?;
            let values = rows.reads(on.stream())?;
            f(Operand {
                activations: Activations::Values {
                    values: values.address,
                    float: float(rows.dtype())?,
                },
                stride: rows.stride,
            })
        }
        Mode::Quantize(quantization) => {
            let (rows, scaling) = (Rows::of(on, x)?, quantization.scaling());
            let stride = kernels::padded(op.k);
            // One piece of memory for both: codes, of which there are a multiple of 16, and scales.
            let scales = scaling.len(op.m, op.k) * size_of::<f32>();
            let mut memory = on.alloc(op.m * stride + scales, DType::U8)?;
            let memory = writes(&mut memory, on.stream())?;
            let to = quantize::To {
                codes: memory.address,
                stride,
                scales: memory.address + (op.m * stride) as kernels::Address,
            };
            let activations = Activations::Codes {
                codes: to.codes,
                scales: to.scales,
                scaling,
            };
            // SAFETY: there is room for codes and scales.
            unsafe { quantize::launch(on, &rows, *quantization, to) }?;
            f(Operand {
                activations,
                stride,
            })
        }
        Mode::Codes { scales, scaling } => {
            let rows = Rows::of(on, x)?.zero_padded(on)?;
            let codes = rows.reads(on.stream())?;
            let (scales, scales_layout) = scales.storage_and_layout();
            let scales = Rows::flat(on, (on_cuda(&scales)?, scales_layout))?;
            let scales = scales.reads(on.stream())?;
            f(Operand {
                activations: Activations::Codes {
                    codes: codes.address,
                    scales: scales.address,
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
    x: Operand,
    weight: View<'_>,
    scale: View<'_>,
) -> Result<CudaStorage> {
    let mut out = on.alloc(op.m * op.n, op.dtype)?;
    if op.m == 0 {
        return Ok(out);
    }
    let weight = match op.in_panels {
        true => Rows::flat(on, weight)?,
        false => Rows::of(on, weight)?.aligned(on)?,
    };
    let weight_layout = match op.in_panels {
        true => WeightLayout::Panels,
        false => WeightLayout::Rows {
            stride: weight.stride,
        },
    };
    let scale = Rows::flat(on, scale)?;
    let bias = op.bias.as_ref().map(Tensor::storage_and_layout);
    let bias = match &bias {
        Some((storage, layout)) => Some(Rows::flat(on, (on_cuda(storage)?, layout))?),
        None => None,
    };
    {
        let codes = weight.reads(on.stream())?;
        let scales = scale.reads(on.stream())?;
        let bias = match &bias {
            Some(bias) => Some((bias.reads(on.stream())?, float(bias.dtype())?)),
            None => None,
        };
        let writes = writes(&mut out, on.stream())?;
        let args = kernels::ScaledMm {
            m: op.m,
            n: op.n,
            k: columns(op, x.activations),
            activations: x.activations,
            row_stride: x.stride,
            weight: codes.address,
            weight_layout,
            weight_scales: scales.address,
            layout: op.layout,
            bias: bias.as_ref().map(|(bias, float)| (bias.address, *float)),
            out: writes.address,
            out_float: float(op.dtype)?,
            accumulation: kernels::Accumulation::Promoted,
            dependent: false,
        };
        // SAFETY: the op is checked: all is as large as it says. It lives until it is freed in the stream's order.
        on.launched(unsafe { kernels::scaled_mm(on.stream(), &args) })?;
    }
    Ok(out)
}

/// K as the kernel is told: with what rows of codes are padded with, where scales are not counted by it. The faster kernels
/// take multiples of 16 only, and zeros add nothing.
fn columns(op: &ScaledMm, activations: Activations) -> usize {
    let padded = kernels::padded(op.k);
    let Activations::Codes { scaling, .. } = activations else {
        return op.k;
    };
    let same = scaling.len(1, op.k) == scaling.len(1, padded)
        && op.layout.len(op.n, op.k) == op.layout.len(op.n, padded);
    if same { padded } else { op.k }
}
