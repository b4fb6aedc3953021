//! Grouped-query attention over a preallocated cache.

use candle_compressed_tensors::{CtLinear, LinearSource, State, merge_linears};
use candle_core::{DType, Tensor};
use candle_fp8::{HeadNorms, Quantization, RopeAppend};
use candle_nn::{Module, VarBuilder};

use crate::input::LinearInput;
use crate::norm::Norm;
use crate::profile::{Part, Timer};
use crate::{Error, KvCache, ModelConfig, Result};

/// `self_attn` of one decoder layer.
#[derive(Debug)]
pub(crate) struct Attention {
    pub(crate) q_proj: CtLinear,
    pub(crate) k_proj: CtLinear,
    pub(crate) v_proj: CtLinear,
    pub(crate) o_proj: CtLinear,
    /// How what computes the input quantizes it.
    input: Option<Quantization>,
    pub(crate) qk_norms: Option<(Norm, Norm)>,
    fake_quantization: CacheScales,
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
    /// Keys that a query sees, itself included; all of them without a window.
    pub(crate) window: Option<usize>,
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
        let [q_proj, k_proj, v_proj] = merge_linears([
            qkv("q_proj", q_dim)?,
            qkv("k_proj", kv_dim)?,
            qkv("v_proj", kv_dim)?,
        ])?;
        Ok(Self {
            input: LinearInput::quantization(&[&q_proj, &k_proj, &v_proj], vb.device()),
            q_proj,
            k_proj,
            v_proj,
            o_proj: source.linear_b(q_dim, hidden, config.o_bias, vb.pp("o_proj"))?,
            qk_norms: match config.qk_norm {
                true => Some((norm("q_norm")?, norm("k_norm")?)),
                false => None,
            },
            fake_quantization: CacheScales::load(config, &vb)?,
            num_heads: config.num_attention_heads,
            num_kv_heads: config.num_key_value_heads,
            head_dim,
            window: config.sliding_windows[layer],
            layer,
            prefix: vb.prefix(),
        })
    }

    /// How the input is to be quantized; `None`: not.
    pub(crate) fn input(&self) -> Option<Quantization> {
        self.input
    }

    /// What scores are multiplied by.
    pub(crate) fn scale(&self) -> f64 {
        1.0 / (self.head_dim as f64).sqrt()
    }

    /// Whether keys and values are rounded to E4M3 on their way into the cache.
    pub(crate) fn rounds_cache(&self) -> bool {
        self.fake_quantization.scales().next().is_some()
    }

    /// `x [B, L, H]`, cos and sin `[L, D / 2]` in x's dtype → `[B, L, H]`. Appends L positions to
    /// this layer's part of the cache.
    pub(crate) fn forward(
        &self,
        x: LinearInput,
        (cos, sin): (&Tensor, &Tensor),
        cache: &mut KvCache,
        timer: Timer<'_>,
    ) -> Result<Tensor> {
        let qkv = [&self.q_proj, &self.k_proj, &self.v_proj];
        let qkv = timer.time(Part::QkvProj, || x.forward(&qkv))?;
        drop(x);
        // On CUDA one kernel does all that is between the projections and attention.
        let q = match qkv[0].device().is_cuda() && !self.rounds_cache() {
            true => timer.time(Part::Rope, || self.rope_append(&qkv, (cos, sin), cache))?,
            false => self.rope_and_append(&qkv, (cos, sin), cache, timer)?,
        };
        drop(qkv);
        let y = timer.time(Part::Attention, || {
            cache.attention(self.layer, &q, self.window, self.scale())
        })?;
        drop(q);
        let y = y.flatten_from(2)?;
        Ok(timer.time(Part::OProj, || self.o_proj.forward(&y))?)
    }

    /// Queries, keys and values `[B, L, heads · D]` of new positions → rotated queries `[B, L, Hq, D]`; keys and values
    /// go to the cache.
    fn rope_append(
        &self,
        qkv: &[Tensor],
        (cos, sin): (&Tensor, &Tensor),
        cache: &mut KvCache,
    ) -> candle_core::Result<Tensor> {
        let norms = self.qk_norms.as_ref().map(|(q_norm, k_norm)| {
            let ((q, eps), (k, _)) = (q_norm.parameters(), k_norm.parameters());
            HeadNorms { q, k, eps }
        });
        let args = RopeAppend {
            q: &qkv[0],
            k: &qkv[1],
            v: &qkv[2],
            norms,
            cos,
            sin,
        };
        cache.rope_append(self.layer, &args)
    }

    /// As [`rope_append`](Self::rope_append), one op after the other: each is timed, and keys and values may be rounded
    /// on their way.
    fn rope_and_append(
        &self,
        qkv: &[Tensor],
        (cos, sin): (&Tensor, &Tensor),
        cache: &mut KvCache,
        timer: Timer<'_>,
    ) -> Result<Tensor> {
        let (batch, len, _) = qkv[0].dims3()?;
        let heads = |y: &Tensor, heads| y.reshape((batch, len, heads, self.head_dim));
        // [B, L, heads, D], as the projections leave them.
        let mut q = heads(&qkv[0], self.num_heads)?;
        let mut k = heads(&qkv[1], self.num_kv_heads)?;
        let v = heads(&qkv[2], self.num_kv_heads)?;
        if let Some((q_norm, k_norm)) = &self.qk_norms {
            (q, k) = timer.time(Part::Norms, || {
                candle_core::Result::Ok((q_norm.forward(&q)?, k_norm.forward(&k)?))
            })?;
        }
        let (q, k) = timer.time(Part::Rope, || {
            let rope = |y: &Tensor| candle_fp8::rope(y, cos, sin);
            candle_core::Result::Ok((rope(&q)?, rope(&k)?))
        })?;
        timer.time(Part::KvCache, || {
            let (k, v) = (k.transpose(1, 2)?, v.transpose(1, 2)?);
            let (k, v) = self.fake_quantization.apply(k, v)?;
            cache.append(self.layer, &k, &v)
        })?;
        Ok(q)
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
