//! RMS norm with the rounding of transformers.

use candle_core::{Result, Tensor};
use candle_fp8::{Quantization, add_rms_norm, add_rms_norm_quantize, rms_norm_quantize};
use candle_nn::VarBuilder;

use crate::input::LinearInput;

/// `weight · cast(x / sqrt(mean(x²) + eps))`, the quotient computed in f32 whatever x's dtype.
#[derive(Debug, Clone)]
pub(crate) struct Norm {
    weight: Tensor,
    eps: f64,
    prefix: String,
}

impl Norm {
    pub(crate) fn load(size: usize, eps: f64, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            weight: vb.get(size, "weight")?,
            eps,
            prefix: vb.prefix(),
        })
    }

    /// Norms of the rows of `x [.., size]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        candle_fp8::rms_norm(x, &self.weight, self.eps)
    }

    /// The residual stream with `update` added, and its norm, quantized if it is to be. `None` is no update: the first
    /// layer's. Frees what it gets as soon as it is added.
    pub(crate) fn forward_added(
        &self,
        stream: Tensor,
        update: Option<Tensor>,
        quantization: Option<Quantization>,
    ) -> Result<(Tensor, LinearInput)> {
        let Self { weight, eps, .. } = self;
        Ok(match (update, quantization) {
            (Some(update), Some(quantization)) => {
                let (stream, normed) =
                    add_rms_norm_quantize(&update, &stream, weight, *eps, quantization)?;
                (stream, LinearInput::Quantized(normed))
            }
            (Some(update), None) => {
                let (stream, normed) = add_rms_norm(&update, &stream, weight, *eps)?;
                (stream, LinearInput::Values(normed))
            }
            (None, Some(quantization)) => {
                let normed = rms_norm_quantize(&stream, weight, *eps, quantization)?;
                (stream, LinearInput::Quantized(normed))
            }
            (None, None) => {
                let normed = self.forward(&stream)?;
                (stream, LinearInput::Values(normed))
            }
        })
    }

    /// What a kernel that does more than the norm needs of it: its weight and what it adds to the mean.
    pub(crate) fn parameters(&self) -> (&Tensor, f64) {
        (&self.weight, self.eps)
    }

    pub(crate) fn weight(&self) -> (String, &Tensor) {
        (format!("{}.weight", self.prefix), &self.weight)
    }
}
