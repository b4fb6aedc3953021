//! What linears get from the op before them.

use candle_compressed_tensors::{CtLinear, forward_quantized, forward_shared, shared_quantization};
use candle_core::{D, Device, Result, Tensor};
use candle_fp8::{Quantization, Quantized};

/// The input `[B, L, in]` of linears: as values, or quantized by what computed it, so that no values are stored.
#[derive(Debug)]
pub(crate) enum LinearInput {
    Values(Tensor),
    Quantized(Quantized),
}

impl LinearInput {
    /// How what computes the input of these linears may quantize it: where all ask for the same, and a kernel does both
    /// at once.
    pub(crate) fn quantization(linears: &[&CtLinear], device: &Device) -> Option<Quantization> {
        shared_quantization(linears).filter(|_| !device.is_cpu())
    }

    /// The outputs of several linears.
    pub(crate) fn forward(&self, linears: &[&CtLinear]) -> Result<Vec<Tensor>> {
        match self {
            Self::Values(x) => forward_shared(linears, x),
            Self::Quantized(x) => forward_quantized(linears, x),
        }
    }

    /// `[.., in]`.
    pub(crate) fn dims(&self) -> &[usize] {
        self.tensor().dims()
    }

    pub(crate) fn device(&self) -> &Device {
        self.tensor().device()
    }

    /// Values or codes.
    fn tensor(&self) -> &Tensor {
        match self {
            Self::Values(x) => x,
            Self::Quantized(x) => &x.codes,
        }
    }

    /// How many rows of `in` there are.
    pub(crate) fn rows(&self) -> usize {
        self.dims().iter().rev().skip(1).product()
    }

    /// `[rows, in]`: so many rows from row `start` on, counted over all leading dimensions.
    pub(crate) fn narrow(&self, start: usize, rows: usize) -> Result<Self> {
        let of = |x: &Tensor| x.flatten_to(D::Minus2)?.narrow(0, start, rows);
        Ok(match self {
            Self::Values(x) => Self::Values(of(x)?),
            Self::Quantized(x) => Self::Quantized(Quantized {
                codes: of(&x.codes)?,
                scales: match x.scales.rank() {
                    // One for all rows.
                    1 => x.scales.clone(),
                    _ => of(&x.scales)?,
                },
                ..*x
            }),
        })
    }

    /// The values of an input that was not to be quantized.
    pub(crate) fn values(&self) -> Result<&Tensor> {
        match self {
            Self::Values(x) => Ok(x),
            Self::Quantized(_) => candle_core::bail!("values were asked of a quantized input"),
        }
    }
}
