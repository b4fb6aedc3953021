//! The named shapes.

use anyhow::{Context, Result, ensure};
use candle_fp8_transformers::ModelConfig;
use clap::ValueEnum;
use serde_json::{Value, json};

/// A model's dimensions under a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Shape {
    /// Llama, 1.1 B parameters: 16 layers, hidden 2048, vocabulary 32000
    #[value(name = "llama-1b")]
    Llama1b,
    /// Llama-3.1-8B
    #[value(name = "llama-8b")]
    Llama8b,
    /// Qwen3-30B-A3B: 128 experts, 8 for each token
    #[value(name = "qwen3-30b-a3b")]
    Qwen3Moe30b,
}

impl Shape {
    /// The name on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Llama1b => "llama-1b",
            Self::Llama8b => "llama-8b",
            Self::Qwen3Moe30b => "qwen3-30b-a3b",
        }
    }

    /// Decoder layers of the whole model.
    pub(crate) fn layers(self) -> usize {
        match self {
            Self::Llama1b => 16,
            Self::Llama8b => 32,
            Self::Qwen3Moe30b => 48,
        }
    }

    /// The configuration with only the first `layers` layers.
    pub(crate) fn config(self, layers: usize) -> Result<ModelConfig> {
        let most = self.layers();
        ensure!(
            (1..=most).contains(&layers),
            "--layers {layers}: {} has {most} layers, so take 1 to {most}",
            self.name()
        );
        let mut config = self.json();
        config["num_hidden_layers"] = layers.into();
        ModelConfig::from_json(&config).context(self.name())
    }

    /// What config.json says, as far as it changes the arithmetic.
    pub(crate) fn json(self) -> Value {
        match self {
            Self::Llama1b => json!({
                "architectures": ["LlamaForCausalLM"],
                "hidden_size": 2048,
                "intermediate_size": 8192,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 64,
                "vocab_size": 32000,
                "max_position_embeddings": 8192,
                "rms_norm_eps": 1e-5,
                "rope_theta": 500000.0,
                "tie_word_embeddings": false,
            }),
            Self::Llama8b => json!({
                "architectures": ["LlamaForCausalLM"],
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "vocab_size": 128256,
                "max_position_embeddings": 131072,
                "rms_norm_eps": 1e-5,
                "rope_theta": 500000.0,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
                "tie_word_embeddings": false,
            }),
            Self::Qwen3Moe30b => json!({
                "architectures": ["Qwen3MoeForCausalLM"],
                "hidden_size": 2048,
                "intermediate_size": 6144,
                "moe_intermediate_size": 768,
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "norm_topk_prob": true,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
                "num_attention_heads": 32,
                "num_key_value_heads": 4,
                "head_dim": 128,
                "vocab_size": 151936,
                "max_position_embeddings": 40960,
                "rms_norm_eps": 1e-6,
                "rope_theta": 1000000.0,
                "tie_word_embeddings": false,
            }),
        }
    }
}
