//! The architectures that are built here, and what their transformers classes take for granted.

use serde_json::Value;

use super::reader::Reader;
use crate::{Error, Result};

/// A family of decoder-only models.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Architecture {
    /// Llama 1, 2 and 3.x, and everything else saved as `LlamaForCausalLM`.
    Llama,
    /// Mistral: Llama with a sliding window (or none).
    Mistral,
    /// Qwen2 and Qwen2.5: biases on q, k and v.
    Qwen2,
    /// Qwen3: RMS norms on the heads of q and k.
    Qwen3,
    /// Qwen3-MoE: Qwen3 with routed experts.
    Qwen3Moe,
    /// Mixtral: Mistral with routed experts.
    Mixtral,
}

impl Architecture {
    const ALL: [Self; 6] = [
        Self::Llama,
        Self::Mistral,
        Self::Qwen2,
        Self::Qwen3,
        Self::Qwen3Moe,
        Self::Mixtral,
    ];

    /// The class name in `architectures`.
    pub fn class_name(self) -> &'static str {
        match self {
            Self::Llama => "LlamaForCausalLM",
            Self::Mistral => "MistralForCausalLM",
            Self::Qwen2 => "Qwen2ForCausalLM",
            Self::Qwen3 => "Qwen3ForCausalLM",
            Self::Qwen3Moe => "Qwen3MoeForCausalLM",
            Self::Mixtral => "MixtralForCausalLM",
        }
    }

    /// The value of `model_type`.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Qwen3Moe => "qwen3_moe",
            Self::Mixtral => "mixtral",
        }
    }

    /// Whether some layers route tokens to experts.
    pub fn is_moe(self) -> bool {
        matches!(self, Self::Qwen3Moe | Self::Mixtral)
    }

    /// The architecture of a config.json: `text_config.model_type` when there is a `text_config`,
    /// else the first of `architectures`, else `model_type`.
    pub(super) fn detect(config: &Value) -> Result<Self> {
        let (key, found, name): (_, _, fn(Self) -> &'static str) =
            if let Some(text) = text_config(config) {
                let found = text.get("model_type");
                ("text_config.model_type", found, Self::model_type)
            } else if let Some(list) = config.get("architectures").filter(|v| !v.is_null()) {
                let first = list.as_array().and_then(|list| list.first());
                ("architectures", first, Self::class_name)
            } else {
                ("model_type", config.get("model_type"), Self::model_type)
            };
        let found = match found {
            Some(Value::String(found)) => found.clone(),
            Some(other) => other.to_string(),
            None => "nothing".to_string(),
        };
        let known = Self::ALL
            .into_iter()
            .find(|&architecture| name(architecture) == found);
        known.ok_or_else(|| Error::UnsupportedArchitecture {
            key: key.to_string(),
            found,
            supported: Self::ALL.map(name).join(", "),
        })
    }

    /// Base of the RoPE frequencies where a config gives none.
    pub(super) fn default_rope_theta(self) -> f64 {
        match self {
            Self::Mixtral => 1e6,
            _ => 1e4,
        }
    }

    /// `rms_norm_eps` of the transformers class.
    pub(super) fn default_eps(self) -> f64 {
        match self {
            Self::Mixtral => 1e-5,
            _ => 1e-6,
        }
    }

    /// The class defaults of sizes. Multimodal checkpoints leave keys out of `text_config` that
    /// equal them; a plain config.json always has every key, so there a missing one is an error.
    pub(super) fn nested_default(self) -> fn(&str) -> Option<u64> {
        match self {
            Self::Llama => |key| match key {
                "vocab_size" => Some(32000),
                "hidden_size" => Some(4096),
                "intermediate_size" => Some(11008),
                "num_hidden_layers" | "num_attention_heads" => Some(32),
                "max_position_embeddings" => Some(2048),
                _ => None,
            },
            Self::Mistral | Self::Mixtral => |key| match key {
                "vocab_size" => Some(32000),
                "hidden_size" => Some(4096),
                "intermediate_size" => Some(14336),
                "num_hidden_layers" | "num_attention_heads" => Some(32),
                "num_key_value_heads" | "num_local_experts" => Some(8),
                "num_experts_per_tok" => Some(2),
                "max_position_embeddings" => Some(131072),
                _ => None,
            },
            Self::Qwen2 | Self::Qwen3 => |key| match key {
                "vocab_size" => Some(151936),
                "hidden_size" => Some(4096),
                "intermediate_size" => Some(22016),
                "num_hidden_layers" | "num_attention_heads" | "num_key_value_heads" => Some(32),
                "max_position_embeddings" => Some(32768),
                _ => None,
            },
            Self::Qwen3Moe => |key| match key {
                "vocab_size" => Some(151936),
                "hidden_size" => Some(2048),
                "intermediate_size" => Some(6144),
                "num_hidden_layers" => Some(24),
                "num_attention_heads" => Some(32),
                "num_key_value_heads" => Some(4),
                "max_position_embeddings" => Some(32768),
                "moe_intermediate_size" => Some(768),
                "num_experts_per_tok" => Some(8),
                "num_experts" => Some(128),
                _ => None,
            },
        }
    }

    /// The window of each layer, `None` where a layer sees everything.
    pub(super) fn sliding_windows(
        self,
        config: &Reader<'_>,
        num_layers: usize,
    ) -> Result<Vec<Option<usize>>> {
        let window = match self {
            Self::Llama => None,
            Self::Qwen2 | Self::Qwen3 | Self::Qwen3Moe if !config.flag("use_sliding_window")? => {
                None
            }
            Self::Mixtral => config.size_opt("sliding_window")?,
            // The class default is a window of 4096; published files without one say null.
            _ if !config.has("sliding_window") => Some(4096),
            _ => config.size_opt("sliding_window")?,
        };
        let Some(window) = window else {
            return Ok(vec![None; num_layers]);
        };
        if !matches!(self, Self::Qwen2 | Self::Qwen3) {
            return Ok(vec![Some(window); num_layers]);
        }
        if let Some(types) = config.get("layer_types") {
            let expected = "a list with `full_attention` or `sliding_attention` for each layer";
            let types = types.as_array().filter(|types| types.len() == num_layers);
            let types = types.ok_or_else(|| config.invalid("layer_types", expected))?;
            let window_of = |kind: &Value| match kind.as_str() {
                Some("full_attention") => Ok(None),
                Some("sliding_attention") => Ok(Some(window)),
                _ => Err(config.unsupported("layer_types", expected)),
            };
            return types.iter().map(window_of).collect();
        }
        // Absent: the class default. 0 is allowed here, so this is not `size_opt`.
        let first = match config.get("max_window_layers") {
            None => 28,
            Some(value) => value
                .as_u64()
                .ok_or_else(|| config.invalid("max_window_layers", "an integer"))?,
        };
        Ok((0..num_layers as u64)
            .map(|i| (i >= first).then_some(window))
            .collect())
    }
}

/// The language model's part of a multimodal config.
pub(super) fn text_config(config: &Value) -> Option<&Value> {
    config.get("text_config").filter(|value| !value.is_null())
}
