//! Linears of one input as one product.

use candle_core::{D, Result, Tensor};
use candle_fp8::{Codes, PackedWeight, ScaleLayout, Weight};

use super::CtFp8Linear;
use crate::CtLinear;

/// FP8 linears of one input, such as a layer's query, key and value projections, one behind the other in memory.
#[derive(Debug)]
pub(super) struct Merged {
    /// `[sum of out, in]`, of which each linear's weight is a part.
    weight: PackedWeight,
    /// F32, of all linears, as `layout` says.
    weight_scale: Tensor,
    /// That of the linears, but one scale for each feature where each linear has one.
    layout: ScaleLayout,
    /// `[sum of out]`.
    bias: Option<Tensor>,
    /// Output features of each linear.
    outs: Vec<usize>,
}

impl Merged {
    /// What an input is multiplied with.
    pub(super) fn operand(&self) -> Weight<'_> {
        Weight {
            codes: Codes::Packed(&self.weight),
            scale: &self.weight_scale,
            layout: self.layout,
            bias: self.bias.as_ref(),
        }
    }

    /// Output features of each linear.
    pub(super) fn outs(&self) -> &[usize] {
        &self.outs
    }

    /// Linears that were merged.
    pub(super) fn len(&self) -> usize {
        self.outs.len()
    }

    /// The outputs of each linear in those of all, `[.., sum of out]`: views.
    pub(super) fn split(&self, y: &Tensor) -> Result<Vec<Tensor>> {
        let mut start = 0;
        let part = |&out: &usize| {
            let part = y.narrow(D::Minus1, start, out);
            start += out;
            part
        };
        self.outs.iter().map(part).collect()
    }
}

/// Lets FP8 linears of one input share a product: [`forward_shared`](crate::forward_shared) of all of them, in this
/// order, is then one product, whose result they get parts of, and each of them is what it was.
///
/// That is so on CUDA, where all are FP8, have the same `in`, are quantized in the same way, activations (a static
/// `input_scale` to the bit) and weights, all or none have a bias, and every `out` but the last is a multiple of 8 and
/// of the rows of a block. Others are given back as they are. While it runs, the weights are there twice.
///
/// # Errors
/// The device has no memory left for the copy.
pub fn merge_linears<const N: usize>(linears: [CtLinear; N]) -> Result<[CtLinear; N]> {
    let fp8: Option<Vec<&CtFp8Linear>> = linears.iter().map(CtLinear::as_fp8).collect();
    let Some(fp8) = fp8.filter(|fp8| fp8.len() > 1 && can_merge(fp8)) else {
        return Ok(linears);
    };
    let weights: Option<Vec<&PackedWeight>> =
        fp8.iter().map(|linear| linear.packed_weight()).collect();
    let joined = weights.map(|weights| PackedWeight::join(&weights));
    let Some((weight, parts)) = joined.transpose()?.flatten() else {
        return Ok(linears);
    };
    let outs: Vec<usize> = fp8.iter().map(|linear| linear.dims().0).collect();
    let scales = fp8
        .iter()
        .zip(&outs)
        .map(|(linear, &out)| match linear.layout() {
            // The product of two scales is the same whether one is there once or for each feature.
            ScaleLayout::Tensor => linear.weight_scale().broadcast_as((out, 1))?.contiguous(),
            ScaleLayout::Channel | ScaleLayout::Block { .. } => Ok(linear.weight_scale().clone()),
        });
    let biases: Option<Vec<&Tensor>> = fp8.iter().map(|linear| linear.bias()).collect();
    let merged = std::sync::Arc::new(Merged {
        weight,
        weight_scale: Tensor::cat(&scales.collect::<Result<Vec<_>>>()?, 0)?,
        layout: match fp8[0].layout() {
            ScaleLayout::Tensor => ScaleLayout::Channel,
            layout => layout,
        },
        bias: biases.map(|biases| Tensor::cat(&biases, 0)).transpose()?,
        outs,
    });
    let mut parts = parts.into_iter().enumerate();
    Ok(linears.map(|linear| match (linear, parts.next()) {
        (CtLinear::Fp8(linear), Some((place, part))) => {
            CtLinear::Fp8(linear.into_part(part, merged.clone(), place))
        }
        (linear, _) => linear,
    }))
}

/// Whether one product can be that of all.
fn can_merge(linears: &[&CtFp8Linear]) -> bool {
    let (first, last) = (linears[0], linears.len() - 1);
    let rows = match first.layout() {
        ScaleLayout::Block { rows, .. } => rows,
        ScaleLayout::Tensor | ScaleLayout::Channel => 1,
    };
    let bias = |linear: &CtFp8Linear| linear.bias().map(Tensor::dtype);
    let like_first = |linear: &CtFp8Linear| {
        linear.layout() == first.layout()
            && linear.shares_input(first)
            && bias(linear) == bias(first)
    };
    let out = |linear: &CtFp8Linear| linear.dims().0;
    linears.iter().all(|linear| like_first(linear))
        && linears[..last]
            .iter()
            .all(|linear| out(linear).is_multiple_of(rows))
}
