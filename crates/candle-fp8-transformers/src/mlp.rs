//! The gated MLP of a dense layer.

use candle_compressed_tensors::{CtLinear, LinearSource, forward_gated_mlp, merge_linears};
use candle_core::Tensor;
use candle_fp8::Quantization;
use candle_nn::VarBuilder;

use crate::input::LinearInput;
use crate::profile::{Part, Timer};
use crate::{ModelConfig, Result};

/// `down(silu(gate(x)) · up(x))`.
#[derive(Debug)]
pub(crate) struct Mlp {
    pub(crate) gate_proj: CtLinear,
    pub(crate) up_proj: CtLinear,
    pub(crate) down_proj: CtLinear,
    /// How what computes the input quantizes it, and that of the down projection.
    input: Option<Quantization>,
    inner: Option<Quantization>,
    prefix: String,
}

impl Mlp {
    pub(crate) fn load(
        config: &ModelConfig,
        source: &dyn LinearSource,
        vb: VarBuilder,
    ) -> Result<Self> {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let linear = |name: &str, in_dim, out_dim| {
            source.linear_b(in_dim, out_dim, config.mlp_bias, vb.pp(name))
        };
        let gate_up = [
            linear("gate_proj", hidden, inner)?,
            linear("up_proj", hidden, inner)?,
        ];
        let [gate_proj, up_proj] = merge_linears(gate_up)?;
        let down_proj = linear("down_proj", inner, hidden)?;
        Ok(Self {
            input: LinearInput::quantization(&[&gate_proj, &up_proj], vb.device()),
            inner: LinearInput::quantization(&[&down_proj], vb.device()),
            gate_proj,
            up_proj,
            down_proj,
            prefix: vb.prefix(),
        })
    }

    /// How the input is to be quantized; `None`: not.
    pub(crate) fn input(&self) -> Option<Quantization> {
        self.input
    }

    /// `x [B, L, H]` → `[B, L, H]`.
    pub(crate) fn forward(&self, x: &LinearInput, timer: Timer<'_>) -> Result<Tensor> {
        if let LinearInput::Values(x) = x {
            let whole = timer.time(Part::GateUpProj, || {
                forward_gated_mlp(&self.gate_proj, &self.up_proj, &self.down_proj, x)
            })?;
            if let Some(y) = whole {
                return Ok(y);
            }
        }
        let gate_up = [&self.gate_proj, &self.up_proj];
        let gate_up = timer.time(Part::GateUpProj, || x.forward(&gate_up))?;
        let (gate, up) = (&gate_up[0], &gate_up[1]);
        let inner = timer.time(Part::SiluMul, || match self.inner {
            Some(quantization) => {
                candle_fp8::silu_mul_quantize(gate, up, quantization).map(LinearInput::Quantized)
            }
            None => candle_fp8::silu_mul(gate, up).map(LinearInput::Values),
        })?;
        let mut y = timer.time(Part::DownProj, || inner.forward(&[&self.down_proj]))?;
        Ok(y.swap_remove(0))
    }

    pub(crate) fn linears(&self) -> impl Iterator<Item = (String, &CtLinear)> {
        [
            ("gate_proj", &self.gate_proj),
            ("up_proj", &self.up_proj),
            ("down_proj", &self.down_proj),
        ]
        .into_iter()
        .map(|(name, linear)| (format!("{}.{name}", self.prefix), linear))
    }
}
