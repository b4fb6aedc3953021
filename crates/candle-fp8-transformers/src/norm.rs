//! RMS norm with the rounding of transformers.

use candle_core::{DType, Device, Tensor};
use candle_nn::{Module, RmsNorm, VarBuilder};

/// `weight · cast(x / sqrt(mean(x²) + eps))`, the quotient computed in f32 whatever x's dtype.
#[derive(Debug, Clone)]
pub(crate) struct Norm {
    inner: RmsNorm,
    prefix: String,
}

impl Norm {
    pub(crate) fn load(size: usize, eps: f64, vb: VarBuilder) -> candle_core::Result<Self> {
        let prefix = vb.prefix();
        let weight = vb.get(size, "weight")?;
        Ok(Self {
            inner: RmsNorm::new(weight, eps),
            prefix,
        })
    }

    pub(crate) fn weight(&self) -> (String, &Tensor) {
        (format!("{}.weight", self.prefix), self.inner.weight())
    }
}

impl Module for Norm {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        // Candle's fused CPU kernel rounds the root mean square itself to x's dtype, which moves
        // a whole row by up to 2^-9 in BF16. The unfused form rounds where transformers does.
        if matches!(x.device(), Device::Cpu) && x.dtype() != DType::F32 {
            self.inner.forward_diff(x)
        } else {
            self.inner.forward(x)
        }
    }
}
