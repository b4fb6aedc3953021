//! What can be launched: checked here, once.

use candle_core::{DType, Result, Tensor, bail};
use candle_kernels_fp8::cuda::{
    self as kernels, Accumulation, Address, Heads, Output, Positions, Residual, WeightLayout,
};

use super::{Launch, LaunchActivations, Launches, OP};
use crate::cuda::float;
use crate::{AttentionScratch, HeadNorms, Quantization, Weight, check_weight};

/// A layer's cache, and where in it a step's tokens go.
#[derive(Debug, Clone, Copy)]
pub struct CacheHeads<'a> {
    /// `[2, B, Hkv, capacity, D]`, contiguous, in the dtype of the activations: keys, then values.
    pub cache: &'a Tensor,
    /// U32 `[B]`: of each sequence's token, read when the kernels run; below the capacity.
    pub positions: &'a Tensor,
}

/// What a rotation needs, beside queries, keys and values.
#[derive(Debug, Clone, Copy)]
pub struct LaunchRope<'a> {
    /// Norms of heads before it.
    pub norms: Option<HeadNorms<'a>>,
    /// `[capacity, D / 2]` in the dtype of the activations, of every position.
    pub cos: &'a Tensor,
    /// As `cos`.
    pub sin: &'a Tensor,
}

impl Launches {
    /// [`rms_norm`](crate::rms_norm) of `x [M, K]`. With a `residual [M, K]` of `x` added to it, which stays there:
    /// then [`add_rms_norm`](crate::add_rms_norm).
    ///
    /// # Errors
    /// If shapes or dtypes do not fit each other.
    pub fn rms_norm(
        &mut self,
        x: &Tensor,
        residual: Option<&Tensor>,
        (weight, eps): (&Tensor, f64),
        out: &LaunchActivations,
    ) -> Result<()> {
        let (m, k) = x.dims2()?;
        same(weight, &[k], x.dtype())?;
        let residual = match residual {
            Some(residual) => {
                same(residual, &[m, k], x.dtype())?;
                let (values, stride) = self.rows(residual)?;
                Some(Residual {
                    values,
                    stride,
                    sum: values,
                    sum_stride: stride,
                })
            }
            None => None,
        };
        let (values, row_stride) = self.rows(x)?;
        let args = kernels::RmsNorm {
            m,
            k,
            x: values,
            row_stride,
            residual,
            weight: self.dense(weight)?,
            eps: eps as f32,
            float: float(x.dtype())?,
            out: self.output(out, (m, k), x.dtype())?,
            dependent: self.dependent(),
        };
        self.push(Launch::RmsNorm(args))
    }

    /// [`silu_mul`](crate::silu_mul) of `gate` and `up`, both `[M, K]`, perhaps parts of one matrix.
    ///
    /// # Errors
    /// If shapes or dtypes do not fit each other.
    pub fn silu_mul(&mut self, gate: &Tensor, up: &Tensor, out: &LaunchActivations) -> Result<()> {
        let (m, k) = gate.dims2()?;
        same(up, &[m, k], gate.dtype())?;
        let (gate_values, gate_stride) = self.rows(gate)?;
        let (up_values, up_stride) = self.rows(up)?;
        let args = kernels::SiluMul {
            m,
            k,
            gate: gate_values,
            gate_stride,
            up: up_values,
            up_stride,
            float: float(gate.dtype())?,
            out: self.output(out, (m, k), gate.dtype())?,
            dependent: self.dependent(),
        };
        self.push(Launch::SiluMul(args))
    }

    /// [`quantize`](crate::quantize) of `x [M, K]`, in the way of `out`.
    ///
    /// # Errors
    /// If shapes or dtypes do not fit each other, or `out` is for values.
    pub fn quantize(&mut self, x: &Tensor, out: &LaunchActivations) -> Result<()> {
        let (m, k) = x.dims2()?;
        let Output::Codes {
            codes,
            stride,
            quantization,
        } = self.output(out, (m, k), x.dtype())?
        else {
            bail!("{OP}: values are not quantized");
        };
        let (values, row_stride) = self.rows(x)?;
        let args = kernels::Quantize {
            m,
            k,
            x: values,
            float: float(x.dtype())?,
            row_stride,
            codes,
            codes_stride: stride,
            quantization,
            dependent: self.dependent(),
        };
        self.push(Launch::Quantize(args))
    }

    /// [`scaled_mm`](crate::scaled_mm) of `x [M, K]`, into `out [M, N]`, contiguous, in the activations' dtype.
    ///
    /// # Errors
    /// If shapes or dtypes do not fit each other, or the weight is not packed.
    pub fn scaled_mm(
        &mut self,
        x: &LaunchActivations,
        weight: Weight<'_>,
        out: &Tensor,
    ) -> Result<()> {
        let (n, k) = check_weight(weight.codes, weight.scale, weight.layout)?;
        if !weight.codes.in_panels() {
            bail!("{OP}: the weight of a step is expected to be packed");
        }
        let (m, dtype) = (out.dim(0)?, out.dtype());
        same(out, &[m, n], dtype)?;
        let activations = match x {
            LaunchActivations::Values(values) => {
                same(values, &[m, k], dtype)?;
                kernels::Activations::Values {
                    values: self.dense(values)?,
                    float: float(dtype)?,
                }
            }
            LaunchActivations::Quantized(quantized, quantization) => {
                same(&quantized.codes, &[m, k], DType::F8E4M3)?;
                if quantized.dtype != dtype {
                    bail!(
                        "{OP}: a product in {dtype:?} of activations in {:?}",
                        quantized.dtype
                    );
                }
                kernels::Activations::Codes {
                    codes: self.dense(&quantized.codes)?,
                    scales: self.dense(&quantized.scales)?,
                    scaling: quantization.scaling(),
                }
            }
        };
        let bias = match weight.bias {
            Some(bias) => {
                same(bias, &[n], bias.dtype())?;
                Some((self.dense(bias)?, float(bias.dtype())?))
            }
            None => None,
        };
        let args = kernels::ScaledMm {
            m,
            n,
            k,
            activations,
            row_stride: k,
            weight: self.dense(weight.codes.tensor())?,
            weight_layout: WeightLayout::Panels,
            weight_scales: self.dense(weight.scale)?,
            layout: weight.layout,
            bias,
            out: self.dense(out)?,
            out_float: float(dtype)?,
            accumulation: Accumulation::Promoted,
            dependent: self.dependent(),
        };
        self.push(Launch::ScaledMm(args))
    }

    /// [`rope_append`](crate::rope_append) of one token of each sequence: `q [B, Hq · D]`, `k` and `v` `[B, Hkv · D]`,
    /// perhaps parts of one matrix. The queries go to `q_out [B, Hq · D]`.
    ///
    /// # Errors
    /// If shapes or dtypes do not fit each other.
    pub fn rope_append(
        &mut self,
        [q, k, v]: [&Tensor; 3],
        rope: LaunchRope<'_>,
        heads: CacheHeads<'_>,
        q_out: &Tensor,
    ) -> Result<()> {
        let memory = self.cache(heads, q)?;
        let dtype = q.dtype();
        let (batch, dim) = (memory.batch, memory.dim);
        let kv_columns = memory.kv_heads * dim;
        same(q_out, &[batch, memory.heads * dim], dtype)?;
        same(k, &[batch, kv_columns], dtype)?;
        same(v, &[batch, kv_columns], dtype)?;
        for angles in [rope.cos, rope.sin] {
            same(angles, &[memory.capacity, dim / 2], dtype)?;
        }
        let norms = match rope.norms {
            Some(norms) => {
                same(norms.q, &[dim], dtype)?;
                same(norms.k, &[dim], dtype)?;
                Some(kernels::HeadNorms {
                    q_weight: self.dense(norms.q)?,
                    k_weight: self.dense(norms.k)?,
                    eps: norms.eps as f32,
                })
            }
            None => None,
        };
        let (q, q_stride) = self.rows(q)?;
        let (k, k_stride) = self.rows(k)?;
        let (v, v_stride) = self.rows(v)?;
        let (q_out, q_out_stride) = self.rows(q_out)?;
        let args = kernels::RopeAppend {
            batch,
            len: 1,
            heads: memory.heads,
            kv_heads: memory.kv_heads,
            dim,
            positions: memory.positions,
            capacity: memory.capacity,
            float: float(dtype)?,
            q,
            q_stride,
            k,
            k_stride,
            v,
            v_stride,
            norms,
            cos: self.dense(rope.cos)?,
            sin: self.dense(rope.sin)?,
            first_angle: 0,
            q_out,
            q_out_stride,
            keys: memory.keys,
            values: memory.values,
            dependent: self.dependent(),
        };
        self.push(Launch::RopeAppend(args))
    }

    /// [`attention_cached`](crate::attention_cached) of one token of each sequence: `q` and `out` are `[B, Hq · D]`.
    ///
    /// # Errors
    /// If shapes or dtypes do not fit each other, `window` is 0, or `scale` is not positive and finite.
    pub fn attention(
        &mut self,
        q: &Tensor,
        heads: CacheHeads<'_>,
        window: Option<usize>,
        scale: f64,
        scratch: &AttentionScratch,
        out: &Tensor,
    ) -> Result<()> {
        let memory = self.cache(heads, q)?;
        same(out, q.dims(), q.dtype())?;
        if window == Some(0) || !crate::attention::kernel_serves(memory.dim, scale) {
            bail!(
                "{OP}: no attention for heads of {}, scale {scale}, window {window:?}",
                memory.dim
            );
        }
        let Some(scratch) = scratch.memory() else {
            bail!("{OP}: scratch memory of another device");
        };
        let float = float(q.dtype())?;
        let (q, q_stride) = self.rows(q)?;
        let (out, out_stride) = self.rows(out)?;
        let args = kernels::Attention {
            batch: memory.batch,
            queries: 1,
            heads: memory.heads,
            kv_heads: memory.kv_heads,
            dim: memory.dim,
            positions: memory.positions,
            capacity: memory.capacity,
            window,
            scale: scale as f32,
            float,
            q,
            q_stride,
            keys: memory.keys,
            values: memory.values,
            out,
            out_stride,
            scratch: self.dense(scratch)?,
            dependent: self.dependent(),
        };
        self.push(Launch::Attention(args))
    }

    fn cache(&mut self, heads: CacheHeads<'_>, q: &Tensor) -> Result<Cache> {
        let cache = heads.cache;
        let (two, batch, kv_heads, capacity, dim) = cache.dims5()?;
        let (q_batch, columns) = q.dims2()?;
        let sizes = [batch, kv_heads, capacity, dim, columns];
        let fits = two == 2
            && !sizes.contains(&0)
            && q_batch == batch
            && dim.is_multiple_of(2)
            && columns.is_multiple_of(kv_heads * dim);
        if !fits || cache.dtype() != q.dtype() {
            bail!(
                "{OP}: a cache {:?} in {:?} for queries {:?} in {:?}",
                cache.dims(),
                cache.dtype(),
                q.dims(),
                q.dtype()
            );
        }
        same(heads.positions, &[batch], DType::U32)?;
        let first = self.dense(cache)?;
        let half = batch * kv_heads * capacity * dim * cache.dtype().size_in_bytes();
        let part = |values| Heads {
            values,
            batch_stride: kv_heads * capacity * dim,
            head_stride: capacity * dim,
        };
        Ok(Cache {
            batch,
            heads: columns / dim,
            kv_heads,
            capacity,
            dim,
            positions: Positions::OnDevice(self.dense(heads.positions)?),
            keys: part(first),
            values: part(first + half as Address),
        })
    }

    /// Where activations go.
    fn output(
        &mut self,
        out: &LaunchActivations,
        (m, k): (usize, usize),
        dtype: DType,
    ) -> Result<Output> {
        let (quantized, quantization) = match out {
            LaunchActivations::Values(values) => {
                same(values, &[m, k], dtype)?;
                let (values, stride) = self.rows(values)?;
                return Ok(Output::Values { values, stride });
            }
            LaunchActivations::Quantized(quantized, quantization) => (quantized, *quantization),
        };
        same(&quantized.codes, &[m, k], DType::F8E4M3)?;
        same(
            &quantized.scales,
            &quantization.scales_shape(&[m, k]),
            DType::F32,
        )?;
        let codes = self.dense(&quantized.codes)?;
        let scales = self.dense(&quantized.scales)?;
        let quantization = match quantization {
            Quantization::PerToken => kernels::Quantization::Token { scales },
            Quantization::PerGroup(group) => kernels::Quantization::Group {
                group: group.min(k),
                scales,
            },
            Quantization::Static(scale) => kernels::Quantization::Static { scale },
            Quantization::PerTensor => {
                bail!("{OP}: one scale for all rows is not known before them")
            }
        };
        Ok(Output::Codes {
            codes,
            stride: k,
            quantization,
        })
    }
}

/// A layer's cache, as kernels take it.
struct Cache {
    batch: usize,
    heads: usize,
    kv_heads: usize,
    capacity: usize,
    dim: usize,
    positions: Positions,
    keys: Heads,
    values: Heads,
}

/// Refuses a tensor of another shape or dtype.
pub(super) fn same(tensor: &Tensor, dims: &[usize], dtype: DType) -> Result<()> {
    if tensor.dims() == dims && tensor.dtype() == dtype {
        return Ok(());
    }
    bail!(
        "{OP}: expected {dims:?} in {dtype:?}, found {:?} in {:?}",
        tensor.dims(),
        tensor.dtype()
    )
}
