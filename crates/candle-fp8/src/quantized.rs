//! Activations in E4M3.

use candle_core::{DType, Tensor};
use candle_kernels_fp8::cpu::Scaling;

use crate::Input;

/// How activations are quantized.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Quantization {
    /// Each row with a scale of its own.
    PerToken,
    /// All with one scale, from their largest magnitude.
    PerTensor,
    /// All with one scale that is given (`input_scale`), positive and finite.
    Static(f32),
    /// Groups of so many neighbours in a row with a scale of their own; not 0; the last group may be short.
    PerGroup(usize),
}

impl Quantization {
    /// Which activations share a scale.
    pub(crate) fn scaling(self) -> Scaling {
        match self {
            Self::PerToken => Scaling::Token,
            Self::PerTensor | Self::Static(_) => Scaling::Tensor,
            Self::PerGroup(group) => Scaling::Group(group),
        }
    }

    /// Whether no scale depends on more than a row, so that rows can be quantized as they are computed.
    #[cfg(any(feature = "cuda", feature = "metal"))]
    pub(crate) fn of_rows(self) -> bool {
        self != Self::PerTensor
    }

    /// The shape of the scales of activations `[.., K]`.
    pub(crate) fn scales_shape(self, dims: &[usize]) -> Vec<usize> {
        let scaling = self.scaling();
        match dims {
            [leading @ .., k] if scaling != Scaling::Tensor => {
                [leading, &[scaling.len(1, *k)]].concat()
            }
            _ => vec![1],
        }
    }

    /// The number of neighbours in a row that share a scale, if it is not the whole row: as [`Input::Codes`] has it.
    pub fn group(self) -> Option<usize> {
        match self {
            Self::PerGroup(group) => Some(group),
            _ => None,
        }
    }
}

/// Activations that were quantized, or produced so: as [`scaled_mm`](crate::scaled_mm) takes them, for any number of
/// weights.
#[derive(Debug, Clone)]
pub struct Quantized {
    /// F8E4M3 `[.., K]`.
    pub codes: Tensor,
    /// F32: `[1]` for all, `[.., 1]` for each row, or with `group` `[.., ceil(K / group)]`.
    pub scales: Tensor,
    /// The number of neighbours in a row that share a scale, if it is not the whole row.
    pub group: Option<usize>,
    /// What the activations were: BF16, F16 or F32, and so will be the products.
    pub dtype: DType,
}

impl Quantized {
    /// As [`scaled_mm`](crate::scaled_mm) takes them.
    pub fn input(&self) -> Input<'_> {
        Input::Codes {
            codes: &self.codes,
            scales: &self.scales,
            group: self.group,
            dtype: self.dtype,
        }
    }
}
