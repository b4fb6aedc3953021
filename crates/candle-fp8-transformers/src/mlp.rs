//! The gated MLP of a dense layer.

use candle_compressed_tensors::{CtLinear, LinearSource, forward_shared};
use candle_core::Tensor;
use candle_nn::{Module, VarBuilder};

use crate::profile::{Part, Timer};
use crate::{ModelConfig, Result};

/// `down(silu(gate(x)) · up(x))`.
#[derive(Debug)]
pub(crate) struct Mlp {
    gate_proj: CtLinear,
    up_proj: CtLinear,
    down_proj: CtLinear,
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
        Ok(Self {
            gate_proj: linear("gate_proj", hidden, inner)?,
            up_proj: linear("up_proj", hidden, inner)?,
            down_proj: linear("down_proj", inner, hidden)?,
            prefix: vb.prefix(),
        })
    }

    /// `x [B, L, H]` → `[B, L, H]`.
    pub(crate) fn forward(&self, x: &Tensor, timer: Timer<'_>) -> Result<Tensor> {
        let gate_up = [&self.gate_proj, &self.up_proj];
        let gate_up = timer.time(Part::GateUpProj, || forward_shared(&gate_up, x))?;
        let inner = timer.time(Part::SiluMul, || {
            candle_fp8::silu_mul(&gate_up[0], &gate_up[1])
        })?;
        Ok(timer.time(Part::DownProj, || self.down_proj.forward(&inner))?)
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
