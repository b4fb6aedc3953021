//! `config.json` → [`ModelConfig`].

mod architecture;
mod reader;
mod rope;

use std::collections::BTreeSet;

use candle_core::DType;
use serde_json::Value;

pub use architecture::Architecture;
pub use rope::{RopeConfig, RopeScaling};

use crate::Result;
use architecture::text_config;
pub(crate) use reader::Reader;

/// More layers than this are refused: per-layer tables are made before any tensor is read.
const MOST_LAYERS: usize = 4096;

/// What a model is built from: the parts of `config.json` that change its arithmetic.
///
/// Field names are those of `config.json` where the two agree.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct ModelConfig {
    /// Which family of models.
    pub architecture: Architecture,
    /// Rows of the embedding, and of the logits.
    pub vocab_size: usize,
    /// Width H of the residual stream.
    pub hidden_size: usize,
    /// Width of dense MLPs. The experts' own width is in [`MoeConfig`].
    pub intermediate_size: usize,
    /// Number of decoder layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; divides `num_attention_heads`.
    pub num_key_value_heads: usize,
    /// Width D of one head; even.
    pub head_dim: usize,
    /// Context length the model was made for. Positions beyond it are computed all the same.
    pub max_position_embeddings: usize,
    /// Epsilon of every RMS norm.
    pub rms_norm_eps: f64,
    /// Rotary position embedding.
    pub rope: RopeConfig,
    /// Whether the logits use the embedding matrix. `None`: config.json does not say, and the
    /// presence of `lm_head.weight` decides.
    pub tie_word_embeddings: Option<bool>,
    /// Biases on q, k and v.
    pub qkv_bias: bool,
    /// Bias on the attention's output projection.
    pub o_bias: bool,
    /// Biases in dense MLPs.
    pub mlp_bias: bool,
    /// RMS norms on each head of q and k, before RoPE.
    pub qk_norm: bool,
    /// For each layer, how many positions a query sees, itself included; `None`: all of them.
    pub sliding_windows: Vec<Option<usize>>,
    /// Routed experts, for MoE models.
    pub moe: Option<MoeConfig>,
    /// Token that starts a text.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a text; generation stops at any of them.
    pub eos_token_ids: BTreeSet<u32>,
    /// The dtype the checkpoint was saved in (`dtype`, formerly `torch_dtype`), when it is one of
    /// F32, F16 and BF16.
    pub dtype: Option<DType>,
}

/// Routed experts of a MoE model.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct MoeConfig {
    /// Experts E in each sparse layer.
    pub num_experts: usize,
    /// Experts that see a token.
    pub num_experts_per_tok: usize,
    /// Width I of one expert.
    pub intermediate_size: usize,
    /// Whether the chosen experts' probabilities are divided by their sum.
    pub norm_topk_prob: bool,
    /// For each layer, whether it is sparse; dense layers use `ModelConfig::intermediate_size`.
    pub sparse_layers: Vec<bool>,
}

impl ModelConfig {
    /// Reads a `config.json`.
    ///
    /// Understands `text_config` (multimodal checkpoints: the language model alone), `rope_theta`
    /// with `rope_scaling` and transformers 5's `rope_parameters`, and eos ids as one id or a list.
    ///
    /// # Errors
    /// Architectures, activations, RoPE types and attention kinds that are not served are refused
    /// with a list of what is; missing keys and values that make no sense are named.
    pub fn from_json(config: &Value) -> Result<Self> {
        let architecture = Architecture::detect(config)?;
        let outer = Reader::new(config, "", architecture.class_name(), |_| None);
        let nested = text_config(config);
        let inner = match nested {
            Some(text) => {
                let default = architecture.nested_default();
                Reader::new(text, "text_config", architecture.class_name(), default)
            }
            None => outer,
        };

        if let Some(act) = inner.get("hidden_act")
            && !matches!(act.as_str(), Some("silu" | "swish"))
        {
            return Err(inner.unsupported("hidden_act", "silu"));
        }

        let hidden_size = inner.size("hidden_size")?;
        let num_attention_heads = inner.size("num_attention_heads")?;
        let num_key_value_heads = match architecture {
            Architecture::Llama => inner
                .size_opt("num_key_value_heads")?
                .unwrap_or(num_attention_heads),
            _ => inner.size("num_key_value_heads")?,
        };
        if !num_attention_heads.is_multiple_of(num_key_value_heads) {
            let expected = format!("a divisor of num_attention_heads ({num_attention_heads})");
            return Err(inner.invalid("num_key_value_heads", &expected));
        }
        let head_dim = match inner.size_opt("head_dim")? {
            Some(head_dim) => head_dim,
            None if architecture == Architecture::Qwen3 && nested.is_some() => 128,
            None if architecture == Architecture::Qwen3 => return Err(inner.missing("head_dim")),
            None if hidden_size.is_multiple_of(num_attention_heads) => {
                hidden_size / num_attention_heads
            }
            None => {
                let expected = format!("a multiple of num_attention_heads ({num_attention_heads})");
                return Err(inner.invalid("hidden_size", &expected));
            }
        };
        if !head_dim.is_multiple_of(2) {
            let key = if inner.has("head_dim") {
                "head_dim"
            } else {
                "hidden_size"
            };
            return Err(inner.invalid(key, "an even width of one head"));
        }
        let num_hidden_layers = inner.size("num_hidden_layers")?;
        if num_hidden_layers > MOST_LAYERS {
            return Err(inner.invalid("num_hidden_layers", "at most 4096"));
        }
        let rms_norm_eps = match inner.positive_opt("rms_norm_eps")? {
            Some(eps) => eps,
            None if nested.is_some() => architecture.default_eps(),
            None => return Err(inner.missing("rms_norm_eps")),
        };
        let max_position_embeddings = inner.size("max_position_embeddings")?;
        let theta = architecture.default_rope_theta();
        // The Mistral classes have no biases whatever their config says, and Qwen2 always has
        // those of q, k and v, and no key that says so.
        let qwen2 = architecture == Architecture::Qwen2;
        let attention_bias = inner.flag("attention_bias")?
            && matches!(
                architecture,
                Architecture::Llama | Architecture::Qwen3 | Architecture::Qwen3Moe
            );
        let mut eos_token_ids: BTreeSet<u32> =
            inner.token_ids("eos_token_id")?.into_iter().collect();
        eos_token_ids.extend(outer.token_ids("eos_token_id")?);

        Ok(Self {
            architecture,
            vocab_size: inner.size("vocab_size")?,
            hidden_size,
            intermediate_size: inner.size("intermediate_size")?,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            max_position_embeddings,
            rms_norm_eps,
            rope: rope::read(&inner, theta, max_position_embeddings)?,
            tie_word_embeddings: match inner.flag_opt("tie_word_embeddings")? {
                Some(tied) => Some(tied),
                None => outer.flag_opt("tie_word_embeddings")?,
            },
            qkv_bias: qwen2 || attention_bias,
            o_bias: attention_bias,
            mlp_bias: architecture == Architecture::Llama && inner.flag("mlp_bias")?,
            qk_norm: matches!(architecture, Architecture::Qwen3 | Architecture::Qwen3Moe),
            sliding_windows: architecture.sliding_windows(&inner, num_hidden_layers)?,
            moe: read_moe(architecture, &inner, num_hidden_layers)?,
            bos_token_id: match inner.token_ids("bos_token_id")?.first() {
                Some(&id) => Some(id),
                None => outer.token_ids("bos_token_id")?.first().copied(),
            },
            eos_token_ids,
            dtype: read_dtype(&inner).or_else(|| read_dtype(&outer)),
        })
    }

    /// Adds the `eos_token_id` of a `generation_config.json` to the set that ends a text. Chat
    /// models often list their end-of-turn token only there.
    ///
    /// # Errors
    /// [`Error::InvalidValue`](crate::Error::InvalidValue) when the key is neither an id nor a list of ids.
    pub fn add_generation_config(&mut self, generation_config: &Value) -> Result<()> {
        let reader = Reader::new(
            generation_config,
            "generation_config.json",
            "generation",
            |_| None,
        );
        self.eos_token_ids.extend(reader.token_ids("eos_token_id")?);
        Ok(())
    }

    /// Bytes of keys and values that one position of one sequence takes in a cache of `dtype`.
    pub fn kv_bytes_per_position(&self, dtype: DType) -> usize {
        2 * self.num_hidden_layers
            * self.num_key_value_heads
            * self.head_dim
            * dtype.size_in_bytes()
    }

    /// Whether layer `index` routes its tokens to experts.
    pub fn is_sparse(&self, index: usize) -> bool {
        let moe = self.moe.as_ref();
        moe.is_some_and(|moe| moe.sparse_layers.get(index).copied().unwrap_or(false))
    }
}

fn read_moe(
    architecture: Architecture,
    config: &Reader<'_>,
    num_layers: usize,
) -> Result<Option<MoeConfig>> {
    let (moe, experts_key) = match architecture {
        Architecture::Mixtral => (
            MoeConfig {
                num_experts: config.size("num_local_experts")?,
                num_experts_per_tok: config.size("num_experts_per_tok")?,
                intermediate_size: config.size("intermediate_size")?,
                norm_topk_prob: true,
                sparse_layers: vec![true; num_layers],
            },
            "num_local_experts",
        ),
        Architecture::Qwen3Moe => {
            // transformers 5 may write the other name; both mean the same.
            let experts_key = if config.has("num_experts") || !config.has("num_local_experts") {
                "num_experts"
            } else {
                "num_local_experts"
            };
            (
                MoeConfig {
                    num_experts: config.size(experts_key)?,
                    num_experts_per_tok: config.size("num_experts_per_tok")?,
                    intermediate_size: config.size("moe_intermediate_size")?,
                    norm_topk_prob: config.flag("norm_topk_prob")?,
                    sparse_layers: sparse_layers(config, num_layers)?,
                },
                experts_key,
            )
        }
        _ => return Ok(None),
    };
    if moe.num_experts_per_tok > moe.num_experts {
        let expected = format!("at most {experts_key} ({})", moe.num_experts);
        return Err(config.invalid("num_experts_per_tok", &expected));
    }
    Ok(Some(moe))
}

/// Every `decoder_sparse_step`-th layer is sparse, except those in `mlp_only_layers`.
fn sparse_layers(config: &Reader<'_>, num_layers: usize) -> Result<Vec<bool>> {
    let step = config.size_opt("decoder_sparse_step")?.unwrap_or(1);
    let mut sparse: Vec<bool> = (0..num_layers)
        .map(|i| (i + 1).is_multiple_of(step))
        .collect();
    if let Some(dense) = config.get("mlp_only_layers") {
        let invalid = || config.invalid("mlp_only_layers", "a list of layer indices");
        for index in dense.as_array().ok_or_else(invalid)? {
            let index = index.as_u64().ok_or_else(invalid)?;
            // An index past the last layer names nothing, as in transformers.
            if let Some(layer) = sparse.get_mut(usize::try_from(index).unwrap_or(usize::MAX)) {
                *layer = false;
            }
        }
    }
    Ok(sparse)
}

fn read_dtype(config: &Reader<'_>) -> Option<DType> {
    let name = config.get("dtype").or_else(|| config.get("torch_dtype"))?;
    match name.as_str()?.trim_start_matches("torch.") {
        "float32" => Some(DType::F32),
        "float16" => Some(DType::F16),
        "bfloat16" => Some(DType::BF16),
        _ => None,
    }
}
