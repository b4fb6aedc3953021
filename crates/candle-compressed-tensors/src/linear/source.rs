//! What a model asks for its weights.

use candle_core::{DType, Result, Shape};
use candle_nn::VarBuilder;

use crate::{CtLinear, dense};

/// Where a model gets its linears from: a checkpoint's quantizer, or made-up weights in a benchmark.
pub trait LinearSource {
    /// The linear `[out_dim, in_dim]` whose tensors are `weight`, `bias`, … under the prefix of `vb`; with a bias if
    /// `bias`. Dense weights get the dtype that [`resident_dtype`](Self::resident_dtype) says, biases that of `vb`.
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

    /// The dtype in which the matrix `tensor` under the prefix of `vb` (a dense linear's `weight`, an embedding) is held
    /// in memory: that of `vb`, in which the model computes, or a narrower one that loses nothing.
    fn resident_dtype(&self, vb: &VarBuilder, tensor: &str) -> DType {
        let _ = tensor;
        vb.dtype()
    }

    /// Whether the matrices `a` and `b` of `vb`, both of `shape`, are one and the same, so that a model needs to hold
    /// only one of them. Both are read for it, and let go.
    ///
    /// # Errors
    /// A tensor is missing or has another shape.
    fn same_values(&self, vb: &VarBuilder, shape: &Shape, a: &str, b: &str) -> Result<bool> {
        same_values(vb, shape, a, b)
    }
}

/// [`LinearSource::same_values`] by reading both.
pub(crate) fn same_values(vb: &VarBuilder, shape: &Shape, a: &str, b: &str) -> Result<bool> {
    let (a, b) = (vb.get(shape, a)?, vb.get(shape, b)?);
    Ok(dense::count_different(&a, &b)? == 0)
}
