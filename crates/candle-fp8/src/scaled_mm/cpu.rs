//! The products on the CPU.

use super::{Input, Mode, OP, ScaledMm, Weight};
use crate::{ScaleLayout, quantize, storage};
use candle_core::{CpuStorage, Layout, Result, Storage, Tensor, bail};
use candle_kernels_fp8::cpu::{self, Activations, InstructionSet};
use std::borrow::Cow;

type View<'a> = (&'a CpuStorage, &'a Layout);

/// One weight's product.
pub(super) fn one(
    op: &ScaledMm,
    x: View<'_>,
    weight: View<'_>,
    scale: View<'_>,
) -> Result<CpuStorage> {
    let operands = Operands::new(op, weight, scale)?;
    let [out] = products(op, x, [operands.weight()])?;
    storage::from_values(out, op.dtype)
}

/// Products of one input with several weights; checks them.
pub(super) fn many(x: &Tensor, input: Input<'_>, weights: &[Weight<'_>]) -> Result<Vec<Tensor>> {
    let ops = weights
        .iter()
        .map(|w| ScaledMm::check(input, w.codes, w.scale, w.layout, w.bias))
        .collect::<Result<Vec<_>>>()?;
    let (Some(op), (x_storage, x_layout)) = (ops.first(), x.storage_and_layout()) else {
        return Ok(Vec::new());
    };
    let guards: Vec<_> = weights
        .iter()
        .map(|w| {
            (
                w.codes.tensor().storage_and_layout(),
                w.scale.storage_and_layout(),
            )
        })
        .collect();
    let operands = ops
        .iter()
        .zip(&guards)
        .map(|(op, ((weight, weight_layout), (scale, scale_layout)))| {
            Operands::new(
                op,
                (on_cpu(weight)?, weight_layout),
                (on_cpu(scale)?, scale_layout),
            )
        })
        .collect::<Result<Vec<_>>>()?;
    let x = (on_cpu(&x_storage)?, x_layout);
    let mut results = Vec::with_capacity(ops.len());
    // Scales of different extent along K cut the activations differently: those weights go one by one.
    let same = operands
        .windows(2)
        .all(|pair| pair[0].layout.run(op.k) == pair[1].layout.run(op.k));
    if same {
        let kernel_weights: Vec<_> = operands.iter().map(Operands::weight).collect();
        results.extend(products_of(op, x, &kernel_weights)?);
    } else {
        for operands in &operands {
            results.extend(products(op, x, [operands.weight()])?);
        }
    }
    let tensors = ops.iter().zip(results);
    tensors
        .map(|(op, out)| {
            Ok(storage::tensor(
                storage::from_values(out, op.dtype)?,
                op.shape.clone(),
            ))
        })
        .collect()
}

fn on_cpu(storage: &Storage) -> Result<&CpuStorage> {
    match storage {
        Storage::Cpu(storage) => Ok(storage),
        _ => bail!("{OP}: the tensors are on different devices"),
    }
}

/// A weight's slices.
struct Operands<'a> {
    n: usize,
    codes: Cow<'a, [u8]>,
    scales: Cow<'a, [f32]>,
    layout: ScaleLayout,
    bias: Option<Vec<f32>>,
}

impl<'a> Operands<'a> {
    fn new(op: &ScaledMm, weight: View<'a>, scale: View<'a>) -> Result<Self> {
        let bias = match &op.bias {
            Some(bias) => Some(storage::on_cpu(OP, bias, |storage, layout| {
                Ok(storage::values(storage, layout)?.into_owned())
            })?),
            None => None,
        };
        Ok(Self {
            n: op.n,
            codes: storage::codes(weight.0, weight.1)?,
            scales: storage::values(scale.0, scale.1)?,
            layout: op.layout,
            bias,
        })
    }

    fn weight(&self) -> cpu::Weight<'_> {
        cpu::Weight {
            n: self.n,
            codes: &self.codes,
            scales: &self.scales,
            layout: self.layout,
            bias: self.bias.as_deref(),
        }
    }
}

fn products<const N: usize>(
    op: &ScaledMm,
    x: View<'_>,
    weights: [cpu::Weight<'_>; N],
) -> Result<[Vec<f32>; N]> {
    match products_of(op, x, &weights)?.try_into() {
        Ok(outs) => Ok(outs),
        Err(_) => bail!("{OP}: as many results as weights"),
    }
}

/// What [`ScaledMm`] says of the input is the same for all weights.
fn products_of(
    op: &ScaledMm,
    (x, x_layout): View<'_>,
    weights: &[cpu::Weight<'_>],
) -> Result<Vec<Vec<f32>>> {
    let mut outs = vec![Vec::new(); weights.len()];
    let mut launch = |activations: Activations<'_>| {
        let args = cpu::ScaledMm {
            m: op.m,
            k: op.k,
            activations,
            weights,
        };
        cpu::scaled_mm(InstructionSet::best(), &args, &mut outs);
    };
    match &op.mode {
        Mode::Full => launch(Activations::Values(&storage::values(x, x_layout)?)),
        Mode::Quantize(quantization) => {
            let values = storage::values(x, x_layout)?;
            let (codes, scales) = quantize::cpu::quantize(&values, op.k, *quantization);
            launch(Activations::Codes {
                codes: &codes,
                scales: &scales,
                scaling: quantization.scaling(),
            });
        }
        Mode::Codes { scales, scaling } => {
            let codes = storage::codes(x, x_layout)?;
            storage::on_cpu(OP, scales, |storage, layout| {
                launch(Activations::Codes {
                    codes: &codes,
                    scales: &storage::values(storage, layout)?,
                    scaling: *scaling,
                });
                Ok(())
            })?;
        }
    }
    Ok(outs)
}
