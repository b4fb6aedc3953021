//! Linears whose weights are on an Intel GPU, between tensors on the CPU.

use std::sync::Arc;

use candle_core::{Result, Tensor};
use candle_fp8::{Quantization, ScaleLayout};
use candle_fp8_xpu::{Input, XpuDevice, XpuWeight};

use super::{CtFp8Linear, fp8::Fp8Weight};

impl CtFp8Linear {
    /// The same linear, its weight uploaded to `device`, where its products run from now on. Inputs and results stay
    /// on the CPU. The codes do not: [`weight`](Self::weight) copies them back.
    ///
    /// # Errors
    /// The linear is not on the CPU, or the device fails, or has too little memory.
    pub fn to_xpu(self, device: &XpuDevice) -> Result<Self> {
        let block = match self.layout() {
            ScaleLayout::Tensor | ScaleLayout::Channel => None,
            ScaleLayout::Block { rows, cols } => Some((rows, cols)),
        };
        let (codes, scale) = (self.weight()?, self.weight_scale());
        let weight = XpuWeight::new(device, &codes, scale, block, self.bias())?;
        Ok(self.moved(Fp8Weight::Xpu(Arc::new(weight))))
    }

    /// The weight on an XPU, if it is there.
    pub fn xpu_weight(&self) -> Option<&XpuWeight> {
        match self.fp8_weight() {
            Fp8Weight::Packed(_) => None,
            Fp8Weight::Xpu(weight) => Some(weight),
        }
    }

    /// How `x` enters the device's op.
    pub(super) fn xpu_input<'a>(&self, x: &'a Tensor) -> Input<'a> {
        match self.activations() {
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
pub(super) fn shared(linears: &[&CtFp8Linear], x: &Tensor) -> Option<Result<Vec<Tensor>>> {
    let weights: Option<Vec<&XpuWeight>> =
        linears.iter().map(|linear| linear.xpu_weight()).collect();
    let input = linears.first()?.xpu_input(x);
    Some(candle_fp8_xpu::scaled_mm_many(input, &weights?))
}

/// The MLP of linears that are on a device.
pub(super) fn gated_mlp(
    gate: &CtFp8Linear,
    up: &CtFp8Linear,
    down: &CtFp8Linear,
    x: &Tensor,
) -> Result<Option<Tensor>> {
    let (Some(gate_weight), Some(up_weight), Some(down_weight)) =
        (gate.xpu_weight(), up.xpu_weight(), down.xpu_weight())
    else {
        return Ok(None);
    };
    if !gate.shares_input(up) {
        return Ok(None);
    }
    let quantization = down.activations().map(on_device);
    let input = gate.xpu_input(x);
    candle_fp8_xpu::gated_mlp(input, gate_weight, up_weight, down_weight, quantization).map(Some)
}
