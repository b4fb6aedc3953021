//! The linears of a model: FP8-resident, or dense where the checkpoint is.

use candle_core::{Result, Tensor};
use candle_fp8::{Input, Quantization, ScaleLayout, scaled_mm};
use candle_nn::{Linear, Module, VarBuilder};

/// A linear whose weight stays in FP8: `y = x · (weight · weight_scale)ᵀ + bias`, through one scaled-matmul op.
///
/// The weight takes one byte a parameter, before and after a forward. `x` is BF16, F16 or F32 of any rank with `in` as
/// its last dimension; `y` has the dtype of `x`.
#[derive(Debug, Clone)]
pub struct CtFp8Linear {
    /// E4M3 codes `[out, in]`.
    weight: Tensor,
    /// F32: `[1]`, `[out, 1]` or `[ceil(out / rows), ceil(in / cols)]`, as `layout` says.
    weight_scale: Tensor,
    layout: ScaleLayout,
    /// `[out]`.
    bias: Option<Tensor>,
    /// How `x` is quantized; `None` keeps its precision (W8A16).
    activations: Option<Quantization>,
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
            weight,
            weight_scale,
            layout,
            bias,
            activations,
        })
    }

    /// The E4M3 codes `[out, in]`.
    pub fn weight(&self) -> &Tensor {
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
}

impl Module for CtFp8Linear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let input = match self.activations {
            Some(quantization) => Input::Quantize(x, quantization),
            None => Input::Full(x),
        };
        scaled_mm(
            input,
            &self.weight,
            &self.weight_scale,
            self.layout,
            self.bias.as_ref(),
        )
    }
}

/// A linear as the checkpoint stores it: FP8 or dense.
#[derive(Debug, Clone)]
pub enum CtLinear {
    /// The weight stays in FP8.
    Fp8(CtFp8Linear),
    /// The checkpoint leaves the module dense, or it was dequantized while loading.
    Dense(Linear),
}

impl CtLinear {
    /// Whether the weight stays in FP8.
    pub fn is_fp8(&self) -> bool {
        matches!(self, Self::Fp8(_))
    }

    /// The weight `[out, in]`: E4M3 codes or dense values.
    pub fn weight(&self) -> &Tensor {
        match self {
            Self::Fp8(linear) => linear.weight(),
            Self::Dense(linear) => linear.weight(),
        }
    }

    /// The bias `[out]`.
    pub fn bias(&self) -> Option<&Tensor> {
        match self {
            Self::Fp8(linear) => linear.bias(),
            Self::Dense(linear) => linear.bias(),
        }
    }

    /// Bytes of the weight and its scale.
    pub fn weight_bytes(&self) -> u64 {
        let bytes = |tensor: &Tensor| (tensor.elem_count() * tensor.dtype().size_in_bytes()) as u64;
        match self {
            Self::Fp8(linear) => bytes(linear.weight()) + bytes(linear.weight_scale()),
            Self::Dense(linear) => bytes(linear.weight()),
        }
    }
}

impl Module for CtLinear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Fp8(linear) => linear.forward(x),
            Self::Dense(linear) => linear.forward(x),
        }
    }
}

/// Where a model gets its linears from: a checkpoint's quantizer, or made-up weights in a benchmark.
pub trait LinearSource {
    /// The linear `[out_dim, in_dim]` whose tensors are `weight`, `bias`, … under the prefix of `vb`; with a bias if
    /// `bias`. Dense tensors get the dtype and device of `vb`.
    ///
    /// # Errors
    /// A tensor is missing or has another shape.
    fn linear_b(
        &self,
        in_dim: usize,
        out_dim: usize,
        bias: bool,
        vb: VarBuilder,
    ) -> Result<CtLinear>;
}
