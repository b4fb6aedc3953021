//! The linears of a model: FP8-resident, or dense where the checkpoint is.

mod dense;
mod fp8;
mod source;

use candle_core::{Result, Tensor};
use candle_fp8::{Weight, scaled_mm_many};
use candle_nn::Module;

pub use dense::CtDenseLinear;
pub use fp8::CtFp8Linear;
pub use source::LinearSource;
pub(crate) use source::same_values;

/// A linear as the checkpoint stores it: FP8 or dense.
#[derive(Debug, Clone)]
pub enum CtLinear {
    /// The weight stays in FP8.
    Fp8(CtFp8Linear),
    /// The checkpoint leaves the module dense, or it was dequantized while loading.
    Dense(CtDenseLinear),
}

impl CtLinear {
    /// Whether the weight stays in FP8.
    pub fn is_fp8(&self) -> bool {
        matches!(self, Self::Fp8(_))
    }

    /// The weight `[out, in]`: E4M3 codes or dense values. On CUDA, a copy of the codes.
    ///
    /// # Errors
    /// The device has no memory left for the copy.
    pub fn weight(&self) -> Result<Tensor> {
        match self {
            Self::Fp8(linear) => linear.weight(),
            Self::Dense(linear) => Ok(linear.weight().clone()),
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
            Self::Fp8(linear) => {
                linear.packed_weight().bytes() as u64 + bytes(linear.weight_scale())
            }
            Self::Dense(linear) => bytes(linear.weight()),
        }
    }

    fn as_fp8(&self) -> Option<&CtFp8Linear> {
        match self {
            Self::Fp8(linear) => Some(linear),
            Self::Dense(_) => None,
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

/// The outputs of several linears of one input `x` `[.., in]`, such as a layer's query, key and value projections: in the
/// order of `linears`, each bit for bit what its own `forward` gives.
///
/// Where all are FP8 and agree on how `x` is quantized and on the runs of K that share a weight scale, `x` is quantized
/// once and one parallel section computes them all. Others run one after the other.
///
/// # Errors
/// Those of the linears' own `forward`, for any of them.
pub fn forward_shared(linears: &[&CtLinear], x: &Tensor) -> Result<Vec<Tensor>> {
    let fp8: Option<Vec<&CtFp8Linear>> = linears.iter().map(|linear| linear.as_fp8()).collect();
    match fp8.as_deref() {
        Some([first, others @ ..])
            if !others.is_empty() && others.iter().all(|other| first.shares_input(other)) =>
        {
            let weights: Vec<Weight<'_>> = (std::iter::once(first).chain(others))
                .map(|linear| linear.operand())
                .collect();
            scaled_mm_many(first.input(x), &weights)
        }
        _ => linears.iter().map(|linear| linear.forward(x)).collect(),
    }
}
