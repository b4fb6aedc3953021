//! Linears whose weights stay in FP8.

use candle_core::{Result, Tensor};
use candle_fp8::{Codes, Input, PackedWeight, Quantization, ScaleLayout, Weight, scaled_mm};
use candle_nn::Module;
use std::sync::Arc;

use super::merge::Merged;

/// A linear whose weight stays in FP8: `y = x · (weight · weight_scale)ᵀ + bias`, through one scaled-matmul op.
///
/// The weight takes one byte a parameter, before and after a forward. `x` is BF16, F16 or F32 of any rank with `in` as
/// its last dimension; `y` has the dtype of `x`.
#[derive(Debug, Clone)]
pub struct CtFp8Linear {
    weight: Fp8Weight,
    /// F32: `[1]`, `[out, 1]` or `[ceil(out / rows), ceil(in / cols)]`, as `layout` says.
    weight_scale: Tensor,
    layout: ScaleLayout,
    /// `[out]`.
    bias: Option<Tensor>,
    /// How `x` is quantized; `None` keeps its precision (W8A16).
    activations: Option<Quantization>,
    /// The linears that it shares a product with, itself among them, and its place there.
    merged: Option<(Arc<Merged>, usize)>,
}

/// E4M3 codes `[out, in]`, in one place.
#[derive(Debug, Clone)]
pub(crate) enum Fp8Weight {
    /// On the device of the inputs.
    Packed(PackedWeight),
    /// On an XPU, with the scale and the bias.
    #[cfg(feature = "xpu")]
    Xpu(Arc<candle_fp8_xpu::XpuWeight>),
}

impl Fp8Weight {
    /// The sizes `(out, in)`.
    pub(crate) fn dims(&self) -> (usize, usize) {
        match self {
            Self::Packed(weight) => weight.dims(),
            #[cfg(feature = "xpu")]
            Self::Xpu(weight) => weight.dims(),
        }
    }

    /// The codes as a tensor.
    pub(crate) fn unpack(&self) -> Result<Tensor> {
        match self {
            Self::Packed(weight) => weight.unpack(),
            #[cfg(feature = "xpu")]
            Self::Xpu(weight) => weight.codes(),
        }
    }

    /// Bytes of memory that the codes take, wherever they are.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Packed(weight) => weight.bytes(),
            #[cfg(feature = "xpu")]
            Self::Xpu(weight) => weight.bytes(),
        }
    }
}

impl CtFp8Linear {
    /// A linear of E4M3 codes `[out, in]`, an F32 scale as `layout` describes it, and a bias `[out]`.
    ///
    /// # Errors
    /// The weight is not a matrix of F8E4M3, or the shape or dtype of the scale or the bias does not fit it.
    pub fn new(
        weight: Tensor,
        weight_scale: Tensor,
        layout: ScaleLayout,
        bias: Option<Tensor>,
        activations: Option<Quantization>,
    ) -> Result<Self> {
        candle_fp8::check_weight(&weight, &weight_scale, layout)?;
        if let Some(bias) = &bias {
            let out = weight.dim(0)?;
            if bias.dims() != [out] {
                candle_core::bail!(
                    "CtFp8Linear: expected a bias of shape [{out}], found {:?}",
                    bias.dims()
                );
            }
        }
        Ok(Self {
            weight: Fp8Weight::Packed(candle_fp8::pack_weight(&weight)?),
            weight_scale,
            layout,
            bias,
            activations,
            merged: None,
        })
    }

    /// The same linear, its weight at a place of merged ones.
    pub(super) fn into_part(self, weight: PackedWeight, merged: Arc<Merged>, place: usize) -> Self {
        Self {
            merged: Some((merged, place)),
            ..self.moved(Fp8Weight::Packed(weight))
        }
    }

    /// The same linear, its weight elsewhere.
    pub(super) fn moved(self, weight: Fp8Weight) -> Self {
        Self {
            weight,
            merged: None,
            ..self
        }
    }

    /// What linears were merged to, if these are all of them in their order.
    pub(super) fn merged<'a>(linears: &[&'a Self]) -> Option<&'a Merged> {
        let (merged, _) = linears.first()?.merged.as_ref()?;
        let of_it = |(place, linear): (usize, &&Self)| {
            let own = linear.merged.as_ref();
            own.is_some_and(|(own, at)| Arc::ptr_eq(own, merged) && *at == place)
        };
        let all = linears.len() == merged.len() && linears.iter().enumerate().all(of_it);
        all.then_some(merged)
    }

    /// The sizes `(out, in)`.
    pub fn dims(&self) -> (usize, usize) {
        self.weight.dims()
    }

    /// The E4M3 codes `[out, in]`. On CUDA and on an XPU, a copy.
    ///
    /// # Errors
    /// There is no memory left for the copy, or an XPU fails.
    pub fn weight(&self) -> Result<Tensor> {
        self.weight.unpack()
    }

    /// The E4M3 codes `[out, in]`, as the ops of the inputs' device read them. `None`: they are on an XPU.
    pub fn packed_weight(&self) -> Option<&PackedWeight> {
        match &self.weight {
            Fp8Weight::Packed(weight) => Some(weight),
            #[cfg(feature = "xpu")]
            Fp8Weight::Xpu(_) => None,
        }
    }

    /// The E4M3 codes, wherever they are.
    pub(crate) fn fp8_weight(&self) -> &Fp8Weight {
        &self.weight
    }

    /// The F32 scale, shaped as [`CtFp8Linear::layout`] says.
    pub fn weight_scale(&self) -> &Tensor {
        &self.weight_scale
    }

    /// What one scale spans.
    pub fn layout(&self) -> ScaleLayout {
        self.layout
    }

    /// The bias `[out]`.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// How inputs are quantized; `None`: they keep their precision.
    pub fn activations(&self) -> Option<Quantization> {
        self.activations
    }

    /// How `x` enters the op.
    pub(super) fn input<'a>(&self, x: &'a Tensor) -> Input<'a> {
        match self.activations {
            Some(quantization) => Input::Quantize(x, quantization),
            None => Input::Full(x),
        }
    }

    /// What `x` is multiplied with, on the device of `x`.
    pub(super) fn operand(&self) -> Option<Weight<'_>> {
        Some(Weight {
            codes: Codes::Packed(self.packed_weight()?),
            scale: &self.weight_scale,
            layout: self.layout,
            bias: self.bias.as_ref(),
        })
    }

    /// Whether one pass over a quantized input serves both: equal K, equal quantization, sums over equal runs of K.
    pub(super) fn shares_input(&self, other: &Self) -> bool {
        let columns = |linear: &Self| linear.dims().1;
        let run = |linear: &Self| match linear.layout {
            ScaleLayout::Tensor | ScaleLayout::Channel => None,
            ScaleLayout::Block { cols, .. } => Some(cols),
        };
        columns(self) == columns(other)
            && run(self) == run(other)
            // Static scales are positive and finite, or the op refuses them: equal ones have equal bits.
            && self.activations == other.activations
    }
}

impl Module for CtFp8Linear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match &self.weight {
            Fp8Weight::Packed(weight) => {
                let bias = self.bias.as_ref();
                scaled_mm(self.input(x), weight, &self.weight_scale, self.layout, bias)
            }
            #[cfg(feature = "xpu")]
            Fp8Weight::Xpu(weight) => candle_fp8_xpu::scaled_mm(self.xpu_input(x), weight),
        }
    }
}
