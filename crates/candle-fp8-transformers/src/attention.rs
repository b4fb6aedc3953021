//! Grouped-query attention over a preallocated cache.

use candle_compressed_tensors::{CtLinear, LinearSource, State};
use candle_core::{DType, Tensor};
use candle_nn::{Module, VarBuilder, ops::softmax_last_dim};

use crate::linalg;
use crate::norm::Norm;
use crate::plan::{AttentionPlan, QueryBlock};
use crate::{Error, KvCache, ModelConfig, Result};

/// `self_attn` of one decoder layer.
#[derive(Debug)]
pub(crate) struct Attention {
    q_proj: CtLinear,
    k_proj: CtLinear,
    v_proj: CtLinear,
    o_proj: CtLinear,
    qk_norms: Option<(Norm, Norm)>,
    fake_quantization: CacheScales,
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
    layer: usize,
    prefix: String,
}

impl Attention {
    pub(crate) fn load(
        config: &ModelConfig,
        layer: usize,
        source: &dyn LinearSource,
        vb: VarBuilder,
    ) -> Result<Self> {
        let (hidden, head_dim) = (config.hidden_size, config.head_dim);
        let (q_dim, kv_dim) = (
            config.num_attention_heads * head_dim,
            config.num_key_value_heads * head_dim,
        );
        let qkv = |name: &str, out| source.linear_b(hidden, out, config.qkv_bias, vb.pp(name));
        let norm = |name: &str| Norm::load(head_dim, config.rms_norm_eps, vb.pp(name));
        Ok(Self {
            q_proj: qkv("q_proj", q_dim)?,
            k_proj: qkv("k_proj", kv_dim)?,
            v_proj: qkv("v_proj", kv_dim)?,
            o_proj: source.linear_b(q_dim, hidden, config.o_bias, vb.pp("o_proj"))?,
            qk_norms: match config.qk_norm {
                true => Some((norm("q_norm")?, norm("k_norm")?)),
                false => None,
            },
            fake_quantization: CacheScales::load(config, &vb)?,
            num_heads: config.num_attention_heads,
            num_kv_heads: config.num_key_value_heads,
            head_dim,
            layer,
            prefix: vb.prefix(),
        })
    }

    /// `x [B, L, H]`, cos and sin `[L, D / 2]` in x's dtype → `[B, L, H]`. Appends L positions to
    /// this layer's part of the cache.
    pub(crate) fn forward(
        &self,
        x: &Tensor,
        (cos, sin): (&Tensor, &Tensor),
        plan: &AttentionPlan,
        cache: &mut KvCache,
    ) -> Result<Tensor> {
        let (batch, len, _) = x.dims3()?;
        let heads = |y: Tensor, heads| y.reshape((batch, len, heads, self.head_dim));
        let mut q = heads(self.q_proj.forward(x)?, self.num_heads)?;
        let mut k = heads(self.k_proj.forward(x)?, self.num_kv_heads)?;
        let v = heads(self.v_proj.forward(x)?, self.num_kv_heads)?;
        if let Some((q_norm, k_norm)) = &self.qk_norms {
            (q, k) = (q_norm.forward(&q)?, k_norm.forward(&k)?);
        }
        // [B, heads, L, D] from here on.
        let rope =
            |y: Tensor| candle_nn::rotary_emb::rope(&y.transpose(1, 2)?.contiguous()?, cos, sin);
        let (q, k) = (rope(q)?, rope(k)?);
        let v = v.transpose(1, 2)?.contiguous()?;
        let (k, v) = self.fake_quantization.apply(k, v)?;

        let (keys, values) = cache.append(self.layer, &k, &v)?;
        let blocks: Vec<Tensor> = plan
            .blocks
            .iter()
            .map(|block| self.attend(&q, &keys, &values, block))
            .collect::<Result<_>>()?;
        let y = match blocks.as_slice() {
            [one] => one.clone(),
            several => Tensor::cat(several, 2)?,
        };
        let y = y
            .transpose(1, 2)?
            .reshape((batch, len, self.num_heads * self.head_dim))?;
        Ok(self.o_proj.forward(&y)?)
    }

    /// One block of queries of `q [B, Hq, L, D]` over `keys`, `values` `[B, Hkv, T, D]` →
    /// `[B, Hq, n, D]`. Heads that share keys are stacked as rows of one product, so that keys and
    /// values are read in place and never repeated.
    fn attend(
        &self,
        q: &Tensor,
        keys: &Tensor,
        values: &Tensor,
        block: &QueryBlock,
    ) -> Result<Tensor> {
        let (batch, num_heads, _, head_dim) = q.dims4()?;
        let (n, t) = (block.query_len, block.key_len);
        let groups = num_heads / self.num_kv_heads;
        let stacked = (batch, self.num_kv_heads, groups * n, head_dim);

        let q = q
            .narrow(2, block.query_start, n)?
            .contiguous()?
            .reshape(stacked)?;
        let keys = keys.narrow(2, block.key_start, t)?;
        let values = values.narrow(2, block.key_start, t)?;

        let scale = 1.0 / (head_dim as f64).sqrt();
        let scores = (linalg::matmul_t(&q, &keys)?.to_dtype(DType::F32)? * scale)?;
        let scores = match &block.mask {
            None => scores,
            Some(mask) => scores
                .reshape((batch, num_heads, n, t))?
                .broadcast_add(mask)?
                .reshape((batch, self.num_kv_heads, groups * n, t))?,
        };
        let y = linalg::matmul(&softmax_last_dim(&scores)?, &values)?;
        Ok(y.to_dtype(values.dtype())?
            .reshape((batch, num_heads, n, head_dim))?)
    }

    pub(crate) fn linears(&self) -> impl Iterator<Item = (String, &CtLinear)> {
        [
            ("q_proj", &self.q_proj),
            ("k_proj", &self.k_proj),
            ("v_proj", &self.v_proj),
            ("o_proj", &self.o_proj),
        ]
        .into_iter()
        .map(|(name, linear)| (format!("{}.{name}", self.prefix), linear))
    }

    /// Adds what is not a linear.
    pub(crate) fn add_to(&self, state: &mut State) {
        if let Some((q_norm, k_norm)) = &self.qk_norms {
            for (name, weight) in [q_norm.weight(), k_norm.weight()] {
                state.tensor(name, weight);
            }
        }
        for scale in self.fake_quantization.scales() {
            state.tensor(format!("{}.{}", self.prefix, scale.name), &scale.stored);
        }
    }
}

/// Scales of a `kv_cache_scheme`: keys (after RoPE) and values take E4M3's precision on their way
/// into the cache.
#[derive(Debug)]
struct CacheScales {
    k: Option<CacheScale>,
    v: Option<CacheScale>,
}

#[derive(Debug)]
struct CacheScale {
    name: &'static str,
    /// As read, for saving.
    stored: Tensor,
    /// F32 `[1]` or `[H, 1, 1]`.
    scale: Tensor,
}

impl CacheScales {
    fn load(config: &ModelConfig, vb: &VarBuilder) -> Result<Self> {
        let heads = config.num_key_value_heads;
        let scale = |name: &'static str| -> Result<Option<CacheScale>> {
            if !vb.contains_tensor(name) {
                return Ok(None);
            }
            let stored = vb.get_unchecked_dtype(name, DType::F32)?;
            let scale = match stored.dims() {
                dims if dims.iter().product::<usize>() == 1 => stored.reshape(1)?,
                [h] | [h, 1, 1] if *h == heads => stored.reshape((heads, 1, 1))?,
                dims => {
                    return Err(Error::Mismatch {
                        what: "shape of a KV cache scale",
                        expected: format!("[1] or [{heads}, 1, 1] for {}.{name}", vb.prefix()),
                        found: format!("{dims:?}"),
                    });
                }
            };
            Ok(Some(CacheScale {
                name,
                stored,
                scale,
            }))
        };
        let scales = Self {
            k: scale("k_scale")?,
            v: scale("v_scale")?,
        };
        if scales.k.is_some() != scales.v.is_some() {
            let found = scales.scales().map(|scale| scale.name).collect::<Vec<_>>();
            return Err(Error::Mismatch {
                what: "KV cache scales",
                expected: format!("both k_scale and v_scale, or neither, in {}", vb.prefix()),
                found: found.join(", "),
            });
        }
        Ok(scales)
    }

    fn scales(&self) -> impl Iterator<Item = &CacheScale> {
        [&self.k, &self.v].into_iter().flatten()
    }

    fn apply(&self, k: Tensor, v: Tensor) -> candle_core::Result<(Tensor, Tensor)> {
        let through = |x: Tensor, scale: &Option<CacheScale>| match scale {
            None => Ok(x),
            Some(scale) => candle_fp8::fake_quantize(&x, &scale.scale),
        };
        Ok((through(k, &self.k)?, through(v, &self.v)?))
    }
}
