//! The linears of a model: FP8-resident, or dense where the checkpoint is.

mod dense;
mod fp8;
mod merge;
mod source;
#[cfg(feature = "xpu")]
mod xpu;

use candle_core::{Result, Tensor};
use candle_fp8::{Input, Quantization, Quantized, Weight, scaled_mm, scaled_mm_many};
use candle_nn::Module;

pub use dense::CtDenseLinear;
pub use fp8::CtFp8Linear;
pub(crate) use fp8::Fp8Weight;
pub use merge::merge_linears;
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

    /// The weight `[out, in]`: E4M3 codes or dense values. On CUDA and on an XPU, a copy of the codes.
    ///
    /// # Errors
    /// There is no memory left for the copy, or an XPU fails.
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
            Self::Fp8(linear) => linear.fp8_weight().bytes() as u64 + bytes(linear.weight_scale()),
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

/// `down(silu(gate(x)) · up(x))`, the MLP of a layer, where one call computes it as a whole: on an XPU that has all
/// three. `None` elsewhere; the result is bit for bit that of [`forward_shared`], [`silu_mul`](candle_fp8::silu_mul)
/// and `down`'s own `forward`.
///
/// # Errors
/// Those of the linears' own `forward`.
pub fn forward_gated_mlp(
    gate: &CtLinear,
    up: &CtLinear,
    down: &CtLinear,
    x: &Tensor,
) -> Result<Option<Tensor>> {
    #[cfg(feature = "xpu")]
    if let (Some(gate), Some(up), Some(down)) = (gate.as_fp8(), up.as_fp8(), down.as_fp8()) {
        return xpu::gated_mlp(gate, up, down, x);
    }
    let _ = (gate, up, down, x);
    Ok(None)
}

/// The outputs of several linears of one input `x` `[.., in]`, such as a layer's query, key and value projections, in
/// the order of `linears`: each what its own `forward` gives, bit for bit unless they are [merged](merge_linears).
///
/// Where all are FP8 and agree on how `x` is quantized and on the runs of K that share a weight scale, `x` is quantized
/// once and one parallel section computes them all. Merged linears are one product, of which the outputs are views; its
/// sums may be added in another order than those of smaller ones. Others run one after the other.
///
/// # Errors
/// Those of the linears' own `forward`, for any of them.
pub fn forward_shared(linears: &[&CtLinear], x: &Tensor) -> Result<Vec<Tensor>> {
    let fp8: Option<Vec<&CtFp8Linear>> = linears.iter().map(|linear| linear.as_fp8()).collect();
    match fp8.as_deref() {
        Some(fp8 @ [first, others @ ..])
            if !others.is_empty() && others.iter().all(|other| first.shares_input(other)) =>
        {
            #[cfg(feature = "xpu")]
            if let Some(products) = xpu::shared(fp8, x) {
                return products;
            }
            products(fp8, first.input(x))
        }
        _ => linears.iter().map(|linear| linear.forward(x)).collect(),
    }
}

/// The products of an input with several weights, which take it as it is.
fn products(linears: &[&CtFp8Linear], input: Input<'_>) -> Result<Vec<Tensor>> {
    if let Some(merged) = CtFp8Linear::merged(linears) {
        let Weight {
            codes,
            scale,
            layout,
            bias,
        } = merged.operand();
        return merged.split(&scaled_mm(input, codes, scale, layout, bias)?);
    }
    let weights: Option<Vec<Weight<'_>>> = linears.iter().map(|linear| linear.operand()).collect();
    match weights {
        Some(weights) => scaled_mm_many(input, &weights),
        None => candle_core::bail!(
            "linears of one input are on different devices: expected all of them on an XPU, or none"
        ),
    }
}

/// How all linears of one input quantize it, if they do it in the same way: what computes the input can then quantize
/// it, for [`forward_quantized`]. `None` on an XPU, which does it itself.
pub fn shared_quantization(linears: &[&CtLinear]) -> Option<Quantization> {
    let fp8: Option<Vec<&CtFp8Linear>> = linears.iter().map(|linear| linear.as_fp8()).collect();
    match fp8?.as_slice() {
        fp8 @ [first, others @ ..]
            if fp8.iter().all(|linear| linear.packed_weight().is_some())
                && others.iter().all(|other| first.shares_input(other)) =>
        {
            first.activations()
        }
        _ => None,
    }
}

/// As [`forward_shared`], of an input that is quantized already, in the way that [`shared_quantization`] says.
///
/// # Errors
/// Nothing of the kind is shared by the linears; else those of [`forward_shared`].
pub fn forward_quantized(linears: &[&CtLinear], x: &Quantized) -> Result<Vec<Tensor>> {
    let fp8: Option<Vec<&CtFp8Linear>> = linears.iter().map(|linear| linear.as_fp8()).collect();
    match (shared_quantization(linears), fp8) {
        (Some(quantization), Some(fp8)) if x.group == quantization.group() => {
            products(&fp8, x.input())
        }
        (quantization, _) => candle_core::bail!(
            "forward_quantized: expected an input quantized as all of its linears ask for, found one with groups of {:?} \
             for linears that share {quantization:?}",
            x.group
        ),
    }
}

/// The products that give the outputs of FP8 linears of one input that they share: each with what the input is
/// multiplied with, and the output features of its linears. One for [merged](merge_linears) linears, else one for each.
/// `None` if one of the linears is dense or on an XPU, or takes the input in another way.
pub fn shared_products<'a>(linears: &[&'a CtLinear]) -> Option<Vec<(Weight<'a>, Vec<usize>)>> {
    let fp8: Option<Vec<&CtFp8Linear>> = linears.iter().map(|linear| linear.as_fp8()).collect();
    let fp8 = fp8?;
    let first = fp8.first()?;
    if !fp8.iter().all(|linear| first.shares_input(linear)) {
        return None;
    }
    if let Some(merged) = CtFp8Linear::merged(&fp8) {
        return Some(vec![(merged.operand(), merged.outs().to_vec())]);
    }
    let alone = |linear: &&'a CtFp8Linear| Some((linear.operand()?, vec![linear.dims().0]));
    fp8.iter().map(alone).collect()
}
