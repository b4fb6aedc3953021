//! One decoder layer.

use candle_compressed_tensors::{CtLinear, LinearSource, State};
use candle_core::Tensor;
use candle_nn::VarBuilder;

use crate::attention::Attention;
use crate::mlp::Mlp;
use crate::moe::SparseMoe;
use crate::norm::Norm;
use crate::profile::{Part, Timer};
use crate::{Architecture, KvCache, ModelConfig, Result};

/// `x += attention(norm(x)); x += mlp(norm(x))`, the last addition left to whoever is next.
#[derive(Debug)]
pub(crate) struct DecoderLayer {
    pub(crate) input_layernorm: Norm,
    pub(crate) self_attn: Attention,
    pub(crate) post_attention_layernorm: Norm,
    pub(crate) mlp: FeedForward,
}

#[derive(Debug)]
pub(crate) enum FeedForward {
    Dense(Mlp),
    Sparse(SparseMoe),
}

impl DecoderLayer {
    pub(crate) fn load(
        config: &ModelConfig,
        layer: usize,
        source: &dyn LinearSource,
        vb: VarBuilder,
    ) -> Result<Self> {
        let norm = |name: &str| Norm::load(config.hidden_size, config.rms_norm_eps, vb.pp(name));
        let mlp_name = match config.architecture {
            Architecture::Mixtral => "block_sparse_moe",
            _ => "mlp",
        };
        let vb_mlp = vb.pp(mlp_name);
        Ok(Self {
            input_layernorm: norm("input_layernorm")?,
            self_attn: Attention::load(config, layer, source, vb.pp("self_attn"))?,
            post_attention_layernorm: norm("post_attention_layernorm")?,
            mlp: match &config.moe {
                Some(moe) if config.is_sparse(layer) => {
                    FeedForward::Sparse(SparseMoe::load(config, moe, source, vb_mlp)?)
                }
                _ => FeedForward::Dense(Mlp::load(config, source, vb_mlp)?),
            },
        })
    }

    /// `stream [B, L, H]` and what is still to be added to it → the same of the next layer: additions are made together
    /// with the norm that follows them. Of a long prompt every tensor between two linears is large, so each is given to
    /// who uses it last, and freed there.
    pub(crate) fn forward(
        &self,
        stream: Tensor,
        update: Option<Tensor>,
        cos_sin: (&Tensor, &Tensor),
        cache: &mut KvCache,
        timer: Timer<'_>,
    ) -> Result<(Tensor, Tensor)> {
        let (norm, quantization) = (&self.input_layernorm, self.self_attn.input());
        let (stream, normed) = timer.time(Part::Norms, || {
            norm.forward_added(stream, update, quantization)
        })?;
        let update = self.self_attn.forward(normed, cos_sin, cache, timer)?;
        let norm = &self.post_attention_layernorm;
        let quantization = match &self.mlp {
            FeedForward::Dense(mlp) => mlp.input(),
            FeedForward::Sparse(_) => None,
        };
        let (stream, normed) = timer.time(Part::Norms, || {
            norm.forward_added(stream, Some(update), quantization)
        })?;
        let update = match &self.mlp {
            FeedForward::Dense(mlp) => mlp.forward(normed, timer)?,
            FeedForward::Sparse(moe) => {
                let normed = normed.values()?;
                timer.time(Part::Experts, || moe.forward(normed))?
            }
        };
        Ok((stream, update))
    }

    pub(crate) fn linears(&self) -> Vec<(String, &CtLinear)> {
        let mut linears: Vec<_> = self.self_attn.linears().collect();
        match &self.mlp {
            FeedForward::Dense(mlp) => linears.extend(mlp.linears()),
            FeedForward::Sparse(moe) => linears.extend(moe.linears()),
        }
        linears
    }

    /// Adds what is not a linear.
    pub(crate) fn add_to(&self, state: &mut State) {
        for (name, weight) in [
            self.input_layernorm.weight(),
            self.post_attention_layernorm.weight(),
        ] {
            state.tensor(name, weight);
        }
        self.self_attn.add_to(state);
        if let FeedForward::Sparse(moe) = &self.mlp {
            moe.add_to(state);
        }
    }
}
