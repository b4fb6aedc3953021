//! RMS norm with the rounding of transformers.

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

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

    /// The residual stream with `update` added, and its norm. `None` is no update: the first layer's.
    pub(crate) fn forward_added(
        &self,
        stream: Tensor,
        update: Option<&Tensor>,
    ) -> Result<(Tensor, Tensor)> {
        match update {
            Some(update) => candle_fp8::add_rms_norm(update, &stream, &self.weight, self.eps),
            None => {
                let normed = self.forward(&stream)?;
                Ok((stream, normed))
            }
        }
    }

    /// What a kernel that does more than the norm needs of it: its weight and what it adds to the mean.
    pub(crate) fn parameters(&self) -> (&Tensor, f64) {
        (&self.weight, self.eps)
    }

    pub(crate) fn weight(&self) -> (String, &Tensor) {
        (format!("{}.weight", self.prefix), &self.weight)
    }
}
