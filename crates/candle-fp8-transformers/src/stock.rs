//! Config structs of stock candle-transformers models.
//!
//! Stock Llama, Qwen2, Qwen3 and Qwen3-MoE load from the `VarBuilder` of a quantizer, dequantized as
//! they are read. These functions give them their configs from the same `config.json`, and refuse
//! what the stock models would silently compute differently.

use candle_nn::Activation;
use candle_transformers::models::{llama, qwen2, qwen3, qwen3_moe};

use crate::{Architecture, Error, ModelConfig, Result, RopeScaling};

/// For `candle_transformers::models::llama::Llama`. Serves Mistral without a window too.
///
/// # Errors
/// [`Error::NotStock`] for other architectures, biases, windows, heads whose width is not
/// `hidden_size / num_attention_heads`, and RoPE types other than `default` and `llama3`.
pub fn llama_config(config: &ModelConfig) -> Result<llama::Config> {
    let check = Check {
        config,
        model: "llama",
    };
    check.architecture(&[Architecture::Llama, Architecture::Mistral])?;
    check.derived_head_dim()?;
    check.no_window()?;
    check.holds(
        !config.qkv_bias && !config.o_bias && !config.mlp_bias,
        "it has no biases",
    )?;
    let rope_scaling = match config.rope.scaling {
        RopeScaling::Default => None,
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => Some(llama::Llama3RopeConfig {
            factor: factor as f32,
            low_freq_factor: low_freq_factor as f32,
            high_freq_factor: high_freq_factor as f32,
            original_max_position_embeddings,
            rope_type: llama::Llama3RopeType::Llama3,
        }),
        _ => return Err(check.error("its RoPE types are default and llama3")),
    };
    let eos: Vec<u32> = config.eos_token_ids.iter().copied().collect();
    Ok(llama::Config {
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        vocab_size: config.vocab_size,
        num_hidden_layers: config.num_hidden_layers,
        num_attention_heads: config.num_attention_heads,
        num_key_value_heads: config.num_key_value_heads,
        use_flash_attn: false,
        rms_norm_eps: config.rms_norm_eps,
        rope_theta: config.rope.theta as f32,
        bos_token_id: config.bos_token_id,
        eos_token_id: match *eos.as_slice() {
            [] => None,
            [id] => Some(llama::LlamaEosToks::Single(id)),
            _ => Some(llama::LlamaEosToks::Multiple(eos)),
        },
        rope_scaling,
        max_position_embeddings: config.max_position_embeddings,
        tie_word_embeddings: config.tie_word_embeddings.unwrap_or(false),
    })
}

/// For `candle_transformers::models::qwen2::ModelForCausalLM`, which ties the logits to the
/// embedding exactly when there is no `lm_head.weight`.
///
/// # Errors
/// [`Error::NotStock`] for other architectures, windows, heads whose width is not
/// `hidden_size / num_attention_heads`, and scaled RoPE.
pub fn qwen2_config(config: &ModelConfig) -> Result<qwen2::Config> {
    let check = Check {
        config,
        model: "qwen2",
    };
    check.architecture(&[Architecture::Qwen2])?;
    check.derived_head_dim()?;
    check.no_window()?;
    check.plain_rope()?;
    Ok(qwen2::Config {
        vocab_size: config.vocab_size,
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        num_hidden_layers: config.num_hidden_layers,
        num_attention_heads: config.num_attention_heads,
        num_key_value_heads: config.num_key_value_heads,
        max_position_embeddings: config.max_position_embeddings,
        // The stock mask applies this width even when windows are off: make it cover everything.
        sliding_window: config.max_position_embeddings,
        max_window_layers: config.num_hidden_layers,
        tie_word_embeddings: config.tie_word_embeddings.unwrap_or(false),
        rope_theta: config.rope.theta,
        rms_norm_eps: config.rms_norm_eps,
        use_sliding_window: false,
        hidden_act: Activation::Silu,
    })
}

/// For `candle_transformers::models::qwen3::ModelForCausalLM`.
///
/// # Errors
/// [`Error::NotStock`] for other architectures, windows and scaled RoPE.
pub fn qwen3_config(config: &ModelConfig) -> Result<qwen3::Config> {
    let check = Check {
        config,
        model: "qwen3",
    };
    check.architecture(&[Architecture::Qwen3])?;
    check.no_window()?;
    check.plain_rope()?;
    Ok(qwen3::Config {
        vocab_size: config.vocab_size,
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        num_hidden_layers: config.num_hidden_layers,
        num_attention_heads: config.num_attention_heads,
        head_dim: config.head_dim,
        attention_bias: config.qkv_bias,
        num_key_value_heads: config.num_key_value_heads,
        max_position_embeddings: config.max_position_embeddings,
        sliding_window: None,
        max_window_layers: config.num_hidden_layers,
        tie_word_embeddings: config.tie_word_embeddings.unwrap_or(false),
        rope_theta: config.rope.theta,
        rms_norm_eps: config.rms_norm_eps,
        use_sliding_window: false,
        hidden_act: Activation::Silu,
    })
}

/// For `candle_transformers::models::qwen3_moe::ModelForCausalLM`.
///
/// # Errors
/// [`Error::NotStock`] for other architectures, windows, scaled RoPE, and sparse layers that are not
/// every n-th one.
pub fn qwen3_moe_config(config: &ModelConfig) -> Result<qwen3_moe::Config> {
    let check = Check {
        config,
        model: "qwen3_moe",
    };
    check.architecture(&[Architecture::Qwen3Moe])?;
    check.no_window()?;
    check.plain_rope()?;
    let moe = config.moe.as_ref();
    let (moe, step) = moe
        .and_then(|moe| Some((moe, sparse_step(&moe.sparse_layers)?)))
        .ok_or_else(|| check.error("its sparse layers are every n-th one"))?;
    Ok(qwen3_moe::Config {
        vocab_size: config.vocab_size,
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        num_hidden_layers: config.num_hidden_layers,
        num_attention_heads: config.num_attention_heads,
        head_dim: config.head_dim,
        attention_bias: config.qkv_bias,
        num_key_value_heads: config.num_key_value_heads,
        max_position_embeddings: config.max_position_embeddings,
        sliding_window: None,
        max_window_layers: config.num_hidden_layers,
        tie_word_embeddings: config.tie_word_embeddings.unwrap_or(false),
        rope_theta: config.rope.theta,
        rms_norm_eps: config.rms_norm_eps,
        use_sliding_window: false,
        hidden_act: Activation::Silu,
        decoder_sparse_step: step,
        moe_intermediate_size: moe.intermediate_size,
        num_experts_per_tok: moe.num_experts_per_tok,
        num_experts: moe.num_experts,
        norm_topk_prob: moe.norm_topk_prob,
    })
}

/// The `decoder_sparse_step` that makes exactly these layers sparse.
fn sparse_step(sparse: &[bool]) -> Option<usize> {
    let step = sparse
        .iter()
        .position(|&sparse| sparse)
        .map_or(sparse.len() + 1, |i| i + 1);
    let regular = |(i, &sparse): (usize, &bool)| (i + 1).is_multiple_of(step) == sparse;
    sparse.iter().enumerate().all(regular).then_some(step)
}

/// What the stock models take for granted.
struct Check<'a> {
    config: &'a ModelConfig,
    model: &'static str,
}

impl Check<'_> {
    fn error(&self, reason: impl Into<String>) -> Error {
        Error::NotStock {
            model: self.model,
            reason: reason.into(),
        }
    }

    fn holds(&self, condition: bool, reason: &str) -> Result<()> {
        if condition {
            Ok(())
        } else {
            Err(self.error(reason))
        }
    }

    fn architecture(&self, served: &[Architecture]) -> Result<()> {
        let found = self.config.architecture;
        let reason = format!("the architecture is {}", found.class_name());
        self.holds(served.contains(&found), &reason)
    }

    fn derived_head_dim(&self) -> Result<()> {
        let derived = self.config.head_dim * self.config.num_attention_heads;
        let reason = "its heads are hidden_size / num_attention_heads wide";
        self.holds(derived == self.config.hidden_size, reason)
    }

    fn no_window(&self) -> Result<()> {
        let windows = &self.config.sliding_windows;
        self.holds(
            windows.iter().all(Option::is_none),
            "it has no sliding window",
        )
    }

    fn plain_rope(&self) -> Result<()> {
        let plain = self.config.rope.scaling == RopeScaling::Default;
        self.holds(plain, "its RoPE is not scaled")
    }
}
