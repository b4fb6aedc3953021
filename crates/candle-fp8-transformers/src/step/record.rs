//! The list of a step's launches, from a model and a cache.

use candle_compressed_tensors::{CtLinear, shared_products, shared_quantization};
use candle_core::{DType, Result, Tensor};
use candle_fp8::{CacheHeads, HeadNorms, LaunchActivations, LaunchRope, Launches, Quantization};

use super::{Given, Parts};
use crate::KvCache;
use crate::attention::Attention;
use crate::layer::{DecoderLayer, FeedForward};
use crate::mlp::Mlp;
use crate::model::Head;
use crate::norm::Norm;

/// Builds the list. Layers share the memory for what is between their ops.
pub(super) struct Recorder<'a> {
    launches: Launches,
    cache: &'a KvCache,
    /// `[B, H]`: the residual stream, from the embeddings on.
    hidden: Tensor,
    positions: Tensor,
    /// `[max_seq, D / 2]`.
    cos: Tensor,
    sin: Tensor,
    batch: usize,
    dtype: DType,
    values: Vec<(&'static str, Tensor)>,
    activations: Vec<(&'static str, Option<Quantization>, LaunchActivations)>,
}

impl<'a> Recorder<'a> {
    pub(super) fn new(
        parts: &Parts<'_>,
        cache: &'a KvCache,
        (cos, sin): (Tensor, Tensor),
        positions: &Tensor,
    ) -> Result<Self> {
        let (batch, launches) = (cache.batch(), Launches::new(parts.device)?);
        Ok(Self {
            hidden: launches.values(batch, parts.hidden_size, parts.dtype)?,
            positions: positions.clone(),
            launches,
            cache,
            cos,
            sin,
            batch,
            dtype: parts.dtype,
            values: Vec::new(),
            activations: Vec::new(),
        })
    }

    /// The list from `ids` U32 `[B]` to what it gives. `None` if a part of it has no launch.
    pub(super) fn record(
        mut self,
        parts: &Parts<'_>,
        ids: &Tensor,
    ) -> Result<Option<(Launches, Given)>> {
        self.launches.embed(parts.embeddings, ids, &self.hidden)?;
        let mut update = None;
        for (index, layer) in parts.layers.iter().enumerate() {
            let Some(next) = self.layer(index, layer, update.as_ref())? else {
                return Ok(None);
            };
            update = Some(next);
        }
        let given = self.end(parts, update.as_ref())?;
        Ok(given.map(|given| (self.launches, given)))
    }

    /// The last norm, and logits if the head has a launch.
    fn end(&mut self, parts: &Parts<'_>, update: Option<&Tensor>) -> Result<Option<Given>> {
        if let Head::Own { linear, .. } = parts.head
            && linear.is_fp8()
        {
            let head = [linear];
            if let Some(normed) =
                self.norm("last", update, parts.norm, shared_quantization(&head))?
            {
                let logits = self.products("logits", &head, &normed)?;
                return Ok(logits.map(|mut logits| Given::Logits(logits.swap_remove(0))));
            }
        }
        let Some(LaunchActivations::Values(normed)) =
            self.norm("last", update, parts.norm, None)?
        else {
            return Ok(None);
        };
        let Some((weight, bias)) = parts.head.dense() else {
            return Ok(Some(Given::Normed(normed)));
        };
        let logits = self.values("logits", weight.dim(0)?)?;
        let launched = self.launches.dense_mm(&normed, weight, bias, &logits)?;
        Ok(Some(match launched {
            true => Given::Logits(logits),
            false => Given::Normed(normed),
        }))
    }

    /// Gives what the layer adds to the residual stream.
    fn layer(
        &mut self,
        index: usize,
        layer: &DecoderLayer,
        update: Option<&Tensor>,
    ) -> Result<Option<Tensor>> {
        let FeedForward::Dense(mlp) = &layer.mlp else {
            return Ok(None);
        };
        let attention = &layer.self_attn;
        if attention.rounds_cache() {
            return Ok(None);
        }
        let (norm, quantization) = (&layer.input_layernorm, attention.input());
        let Some(normed) = self.norm("normed", update, norm, quantization)? else {
            return Ok(None);
        };
        let Some(update) = self.attention(index, attention, &normed)? else {
            return Ok(None);
        };
        let (norm, quantization) = (&layer.post_attention_layernorm, mlp.input());
        let Some(normed) = self.norm("normed", Some(&update), norm, quantization)? else {
            return Ok(None);
        };
        self.mlp(mlp, &normed)
    }

    /// Adds an update to the residual stream, if there is one, and takes the norm of it.
    fn norm(
        &mut self,
        name: &'static str,
        update: Option<&Tensor>,
        norm: &Norm,
        quantization: Option<Quantization>,
    ) -> Result<Option<LaunchActivations>> {
        let columns = self.hidden.dim(1)?;
        let Some(out) = self.activations(name, columns, quantization)? else {
            return Ok(None);
        };
        let hidden = self.hidden.clone();
        let (x, residual) = match update {
            Some(update) => (update, Some(&hidden)),
            None => (&hidden, None),
        };
        self.launches
            .rms_norm(x, residual, norm.parameters(), &out)?;
        Ok(Some(out))
    }

    fn attention(
        &mut self,
        index: usize,
        attention: &Attention,
        x: &LaunchActivations,
    ) -> Result<Option<Tensor>> {
        let qkv = [&attention.q_proj, &attention.k_proj, &attention.v_proj];
        let Some(qkv) = self.products("qkv", &qkv, x)? else {
            return Ok(None);
        };
        let columns = qkv[0].dim(1)?;
        let q = self.values("q", columns)?;
        let out = self.values("attention", columns)?;
        let cache = self.cache;
        let positions = self.positions.clone();
        let heads = CacheHeads {
            cache: cache.layer(index),
            positions: &positions,
        };
        let norms = attention.qk_norms.as_ref().map(|(q_norm, k_norm)| {
            let ((q, eps), (k, _)) = (q_norm.parameters(), k_norm.parameters());
            HeadNorms { q, k, eps }
        });
        let rope = LaunchRope {
            norms,
            cos: &self.cos,
            sin: &self.sin,
        };
        let parts = [&qkv[0], &qkv[1], &qkv[2]];
        self.launches.rope_append(parts, rope, heads, &q)?;
        let (window, scale) = (attention.window, attention.scale());
        self.launches
            .attention(&q, heads, window, scale, cache.scratch(), &out)?;
        let o_proj = [&attention.o_proj];
        let Some(x) = self.quantized("attention", &out, &o_proj)? else {
            return Ok(None);
        };
        Ok(self
            .products("o", &o_proj, &x)?
            .map(|mut y| y.swap_remove(0)))
    }

    fn mlp(&mut self, mlp: &Mlp, x: &LaunchActivations) -> Result<Option<Tensor>> {
        let gate_up = [&mlp.gate_proj, &mlp.up_proj];
        let Some(gate_up) = self.products("gate_up", &gate_up, x)? else {
            return Ok(None);
        };
        let down = [&mlp.down_proj];
        let quantization = shared_quantization(&down);
        let Some(inner) = self.activations("inner", gate_up[0].dim(1)?, quantization)? else {
            return Ok(None);
        };
        self.launches.silu_mul(&gate_up[0], &gate_up[1], &inner)?;
        Ok(self
            .products("down", &down, &inner)?
            .map(|mut y| y.swap_remove(0)))
    }

    /// The outputs `[B, out]` of linears of one input. `None` if they do not share it.
    fn products(
        &mut self,
        name: &'static str,
        linears: &[&CtLinear],
        x: &LaunchActivations,
    ) -> Result<Option<Vec<Tensor>>> {
        let Some(products) = shared_products(linears) else {
            return Ok(None);
        };
        let mut all = Vec::new();
        // Where the linears are not merged, each has memory of its own.
        let names = [name, "second product", "third product"];
        for ((weight, outs), name) in products.into_iter().zip(names) {
            let out = self.values(name, outs.iter().sum())?;
            self.launches.scaled_mm(x, weight, &out)?;
            let mut start = 0;
            for columns in outs {
                all.push(out.narrow(1, start, columns)?);
                start += columns;
            }
        }
        Ok((all.len() == linears.len()).then_some(all))
    }

    /// Values as linears take them.
    fn quantized(
        &mut self,
        name: &'static str,
        values: &Tensor,
        linears: &[&CtLinear],
    ) -> Result<Option<LaunchActivations>> {
        let Some(quantization) = shared_quantization(linears) else {
            return Ok(Some(LaunchActivations::Values(values.clone())));
        };
        let columns = values.dim(1)?;
        let Some(out) = self.activations(name, columns, Some(quantization))? else {
            return Ok(None);
        };
        self.launches.quantize(values, &out)?;
        Ok(Some(out))
    }

    /// Memory for values `[B, columns]`, the same for each layer.
    fn values(&mut self, name: &'static str, columns: usize) -> Result<Tensor> {
        let same = |(other, values): &&(&'static str, Tensor)| {
            *other == name && values.dims() == [self.batch, columns]
        };
        if let Some((_, values)) = self.values.iter().find(same) {
            return Ok(values.clone());
        }
        let values = self.launches.values(self.batch, columns, self.dtype)?;
        self.values.push((name, values.clone()));
        Ok(values)
    }

    /// Memory for activations `[B, columns]`, the same for each layer that quantizes alike.
    fn activations(
        &mut self,
        name: &'static str,
        columns: usize,
        quantization: Option<Quantization>,
    ) -> Result<Option<LaunchActivations>> {
        let same =
            |(other, how, made): &&(&'static str, Option<Quantization>, LaunchActivations)| {
                let tensor = match made {
                    LaunchActivations::Values(values) => values,
                    LaunchActivations::Quantized(quantized, _) => &quantized.codes,
                };
                *other == name && *how == quantization && tensor.dims() == [self.batch, columns]
            };
        if let Some((_, _, made)) = self.activations.iter().find(same) {
            return Ok(Some(made.clone()));
        }
        let made = self
            .launches
            .activations(self.batch, columns, self.dtype, quantization)?;
        if let Some(made) = &made {
            self.activations.push((name, quantization, made.clone()));
        }
        Ok(made)
    }
}
