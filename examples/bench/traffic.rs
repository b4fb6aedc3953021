//! The bytes that a decode step has to read: what tokens a second are measured against.

use candle_fp8_transformers::{CausalLm, ModelConfig, Part};

/// Bytes of a decode step, from the tensors that the model holds, in the dtypes in which it holds them.
pub(crate) struct Traffic {
    /// Weights and scales: every linear and norm once, one row of the embedding for each sequence, and of the experts
    /// those that are touched.
    weights: f64,
    /// Keys and values of one position of all sequences.
    position: f64,
    /// Sequences.
    batch: usize,
}

impl Traffic {
    /// For `batch` sequences.
    pub(crate) fn of(model: &CausalLm, batch: usize) -> Self {
        let config = model.config();
        let touched = experts_touched(config, batch);
        let state = model.state();
        let weights = state.names().filter_map(|name| {
            let tensor = state.get(name)?;
            let rows = match name {
                _ if name.ends_with("embed_tokens.weight") => batch as f64,
                _ if name.contains(".experts.") => touched,
                _ => return Some(tensor.bytes() as f64),
            };
            Some(tensor.bytes() as f64 * rows / tensor.dims()[0] as f64)
        });
        Self {
            weights: weights.sum(),
            position: (batch * config.kv_bytes_per_position(model.dtype())) as f64,
            batch,
        }
    }

    /// Keys and values of one position of all sequences.
    pub(crate) fn position_bytes(&self) -> f64 {
        self.position
    }

    /// Bytes that a token of one sequence costs, in the mean over `steps` steps after `context` positions.
    pub(crate) fn token_bytes(&self, context: usize, steps: usize) -> f64 {
        let bytes = (0..steps).map(|step| self.step_bytes(context + step));
        bytes.sum::<f64>() / (steps * self.batch) as f64
    }

    /// With `context` positions in the cache before the step: they are read, and so is the new one.
    pub(crate) fn step_bytes(&self, context: usize) -> f64 {
        self.weights + self.position * (context + 1) as f64
    }
}

/// The linears of one part of a forward pass, in all layers.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Linears {
    /// Of weights and scales.
    pub(crate) bytes: f64,
    /// Weights.
    pub(crate) weights: f64,
}

impl Linears {
    /// Those of `part`; none for a part that is no linear, and for experts, of which only some are read.
    pub(crate) fn of(model: &CausalLm, part: Part) -> Self {
        let names: &[&str] = match part {
            Part::QkvProj => &["q_proj", "k_proj", "v_proj"],
            Part::OProj => &["o_proj"],
            Part::GateUpProj => &["gate_proj", "up_proj"],
            Part::DownProj => &["down_proj"],
            Part::LmHead => &["lm_head"],
            _ => &[],
        };
        let state = model.state();
        let mut linears = Self::default();
        for name in state.names() {
            // model.layers.0.mlp.up_proj.weight_scale
            let mut words = name.rsplit('.');
            let (tensor, module) = (words.next(), words.next());
            if let (true, Some(values)) = (
                module.is_some_and(|module| names.contains(&module)),
                state.get(name),
            ) {
                linears.bytes += values.bytes() as f64;
                if tensor == Some("weight") {
                    linears.weights += values.dims().iter().product::<usize>() as f64;
                }
            }
        }
        linears
    }
}

/// Experts of one layer that a step of `batch` tokens touches: their mean when every token takes k of E at random,
/// `E · (1 - (1 - k / E)^batch)`; k for one token. 0 for a dense model.
fn experts_touched(config: &ModelConfig, batch: usize) -> f64 {
    config.moe.as_ref().map_or(0., |moe| {
        let (experts, chosen) = (moe.num_experts as f64, moe.num_experts_per_tok as f64);
        experts * (1. - (1. - chosen / experts).powf(batch as f64))
    })
}

#[cfg(test)]
mod tests {
    use super::super::random::RandomWeights;
    use super::*;
    use candle_core::{DType, Device};
    use serde_json::json;

    #[test]
    fn a_step_reads_every_linear_once_and_the_experts_that_are_touched() {
        let config = ModelConfig::from_json(&json!({
            "architectures": ["Qwen3MoeForCausalLM"],
            "hidden_size": 16, "intermediate_size": 32, "moe_intermediate_size": 8,
            "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": true,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
            "vocab_size": 50, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
            "tie_word_embeddings": false,
        }))
        .unwrap();
        let weights = RandomWeights::new(|_| ());
        let vb = weights.var_builder(DType::BF16, &Device::Cpu);
        let model = CausalLm::load(&config, &weights, vb).unwrap();

        let attention = (16 + 8 + 8 + 16) * 16 + 4 * (16 + 8 + 8 + 16); // one byte a weight, an F32 scale a channel
        let norms = 2 * (16 + 16 + 4 + 4);
        let router = 2 * 4 * 16;
        let expert = 2 * (2 * 8 * 16 + 16 * 8);
        let ends = 2 * (16 + 50 * 16); // final norm, output projection
        let fixed = 3 * (attention + norms + router) + ends;
        let row = 2 * 16;
        let position = 3 * 2 * 2 * 4 * 2; // layers, keys and values, heads, head, BF16

        let step = |batch, context| Traffic::of(&model, batch).step_bytes(context);
        assert_eq!(step(1, 0), (fixed + 3 * 2 * expert + row + position) as f64);
        assert_eq!(step(1, 9) - step(1, 0), (9 * position) as f64);
        // Two tokens touch 4 · (1 - 1/4) = 3 of 4 experts on average.
        assert_eq!(
            step(2, 5),
            (fixed + 3 * 3 * expert + 2 * row + 2 * 6 * position) as f64
        );
    }
}
