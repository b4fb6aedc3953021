//! What a step has before its layers and after them: tokens in, tokens out.

use candle_core::{DType, Result, Tensor, bail};
use candle_kernels_fp8::cuda as kernels;

use super::ops::same;
use super::{Launch, Launches, OP};
use crate::cuda::float;

/// Where the choice of tokens goes.
#[derive(Debug, Clone, Copy)]
pub struct LaunchArgmax<'a> {
    /// U32 `[B]`: receives the ids. Those that [`Launches::embed`] reads, if the next run is to go on from them.
    pub ids: &'a Tensor,
    /// U32 `[B]`: each is increased by one.
    pub positions: &'a Tensor,
    /// U32 `[1]`, which becomes 1 if a logit is NaN or infinite, and is left alone otherwise.
    pub not_finite: &'a Tensor,
}

impl Launches {
    /// Rows of `table [V, H]`, by `ids`, U32 `[M]`, which are read when it runs, into `out [M, H]`, in the dtype of
    /// `out`. An id of V or more gives a row of NaN.
    ///
    /// # Errors
    /// If shapes or dtypes do not fit each other.
    pub fn embed(&mut self, table: &Tensor, ids: &Tensor, out: &Tensor) -> Result<()> {
        let (vocab, dim) = table.dims2()?;
        let n = ids.dim(0)?;
        same(ids, &[n], DType::U32)?;
        same(out, &[n, dim], out.dtype())?;
        if vocab == 0 || dim == 0 {
            bail!("{OP}: a table {:?} has no rows", table.dims());
        }
        let args = kernels::Embed {
            n,
            vocab,
            dim,
            table: self.dense(table)?,
            float: float(table.dtype())?,
            ids: self.dense(ids)?,
            out: self.dense(out)?,
            out_float: float(out.dtype())?,
            unknown: None,
            dependent: self.dependent(),
        };
        self.push(Launch::Embed(args))
    }

    /// `x [M, K]` times the transpose of `weight [N, K]`, and `bias [N]` added, in f32, into `out [M, N]`, in its
    /// dtype. False, and no launch, if there is no kernel for it: more than 16 rows, a weight that is not in the dtype
    /// of `x`, F32, or rows that are no multiples of 16 bytes.
    ///
    /// # Errors
    /// If shapes do not fit each other.
    pub fn dense_mm(
        &mut self,
        x: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        out: &Tensor,
    ) -> Result<bool> {
        let ((m, k), (n, _)) = (x.dims2()?, weight.dims2()?);
        same(out, &[m, n], out.dtype())?;
        same(weight, &[n, k], weight.dtype())?;
        if weight.dtype() != x.dtype() {
            return Ok(false);
        }
        let bias = match bias {
            Some(bias) => {
                same(bias, &[n], bias.dtype())?;
                Some((self.dense(bias)?, float(bias.dtype())?))
            }
            None => None,
        };
        let (x_address, row_stride) = self.rows(x)?;
        let (weight_address, weight_stride) = self.rows(weight)?;
        let args = kernels::DenseMm {
            m,
            n,
            k,
            x: x_address,
            row_stride,
            weight: weight_address,
            weight_stride,
            float: float(x.dtype())?,
            bias,
            out: self.dense(out)?,
            out_float: float(out.dtype())?,
            dependent: self.dependent(),
        };
        if !kernels::dense_mm_serves(&args) {
            return Ok(false);
        }
        self.push(Launch::DenseMm(args))?;
        Ok(true)
    }

    /// The most probable token of each sequence, by `logits [B, V]`: the first of the largest, as Candle's `argmax` on
    /// the CPU. The last launch of a list, as it moves positions on, which launches before it read.
    ///
    /// # Errors
    /// If shapes or dtypes do not fit each other, V is 0, the list is empty (then nothing made them), or the device has no
    /// memory left.
    pub fn argmax(&mut self, logits: &Tensor, to: LaunchArgmax<'_>) -> Result<()> {
        let (batch, vocab) = logits.dims2()?;
        same(to.ids, &[batch], DType::U32)?;
        same(to.positions, &[batch], DType::U32)?;
        same(to.not_finite, &[1], DType::U32)?;
        if vocab == 0 || self.is_empty() {
            bail!("{OP}: logits {:?} are of no token", logits.dims());
        }
        let words = kernels::argmax_scratch(batch).div_ceil(4);
        let scratch = Tensor::zeros(words, DType::U32, logits.device())?;
        let (values, row_stride) = self.rows(logits)?;
        let args = kernels::Argmax {
            batch,
            vocab,
            logits: values,
            row_stride,
            float: float(logits.dtype())?,
            ids: self.dense(to.ids)?,
            next: None,
            positions: Some(self.dense(to.positions)?),
            not_finite: Some(self.dense(to.not_finite)?),
            scratch: self.dense(&scratch)?,
            dependent: self.dependent(),
        };
        self.push(Launch::Argmax(args))
    }
}
