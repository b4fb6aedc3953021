//! Linears whose weights are on an Intel GPU, between tensors on the CPU.

use std::sync::Arc;

use candle_core::{Result, Tensor};
use candle_fp8::{Quantization, ScaleLayout};
use candle_fp8_xpu::{Input, XpuDevice, XpuWeight};

use super::CtFp8Linear;

impl CtFp8Linear {
    /// The same linear, its weight uploaded to `device`, where its products run from now on. Inputs and results stay
    /// on the CPU, and so do the tensors of the linear, for saving.
    ///
    /// # Errors
    /// The linear is not on the CPU, or the device has too little memory.
    pub fn to_xpu(mut self, device: &XpuDevice) -> Result<Self> {
        let block = match self.layout {
            ScaleLayout::Tensor | ScaleLayout::Channel => None,
            ScaleLayout::Block { rows, cols } => Some((rows, cols)),
        };
        let bias = self.bias.as_ref();
        let weight = XpuWeight::new(device, &self.weight()?, &self.weight_scale, block, bias)?;
        self.xpu = Some(Arc::new(weight));
        Ok(self)
    }

    /// The weight on its device, if it has one.
    pub(super) fn on_xpu(&self) -> Option<&XpuWeight> {
        self.xpu.as_deref()
    }

    /// How `x` enters the device's op.
    pub(super) fn xpu_input<'a>(&self, x: &'a Tensor) -> Input<'a> {
        match self.activations {
            Some(quantization) => Input::Quantize(x, on_device(quantization)),
            None => Input::Full(x),
        }
    }
}

fn on_device(quantization: Quantization) -> candle_fp8_xpu::Quantization {
    use candle_fp8_xpu::Quantization as Xpu;
    match quantization {
        Quantization::PerToken => Xpu::PerToken,
        Quantization::PerTensor => Xpu::PerTensor,
        Quantization::Static(scale) => Xpu::Static(scale),
        Quantization::PerGroup(group) => Xpu::PerGroup(group),
    }
}

/// The products of linears that share an input, if all are on a device.
pub(super) fn shared(
    first: &CtFp8Linear,
    others: &[&CtFp8Linear],
    x: &Tensor,
) -> Option<Result<Vec<Tensor>>> {
    let linears = std::iter::once(&first).chain(others);
    let weights: Option<Vec<&XpuWeight>> = linears.map(|linear| linear.on_xpu()).collect();
    weights.map(|weights| candle_fp8_xpu::scaled_mm_many(first.xpu_input(x), &weights))
}

/// The MLP of linears that are on a device.
pub(super) fn gated_mlp(
    gate: &CtFp8Linear,
    up: &CtFp8Linear,
    down: &CtFp8Linear,
    x: &Tensor,
) -> Result<Option<Tensor>> {
    let (Some(gate_weight), Some(up_weight), Some(down_weight)) =
        (gate.on_xpu(), up.on_xpu(), down.on_xpu())
    else {
        return Ok(None);
    };
    if !gate.shares_input(up) {
        return Ok(None);
    }
    let quantization = down.activations.map(on_device);
    let input = gate.xpu_input(x);
    candle_fp8_xpu::gated_mlp(input, gate_weight, up_weight, down_weight, quantization).map(Some)
}
