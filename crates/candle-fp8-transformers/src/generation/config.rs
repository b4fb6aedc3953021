//! How tokens are chosen, and when generation stops.

use std::collections::BTreeSet;

use candle_transformers::generation::{LogitsProcessor, Sampling};
use serde_json::Value;

use crate::{Error, ModelConfig, Result};

/// Settings of a generation. [`Default`] is greedy, without a penalty, 128 tokens at most, and never
/// stops early: take [`GenerationConfig::new`] for the end-of-text tokens of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerationConfig {
    /// Divides the logits before sampling; `None` or 0: greedy, the most probable token each time.
    pub temperature: Option<f64>,
    /// Samples among the most probable tokens that together reach this probability, in (0, 1].
    pub top_p: Option<f64>,
    /// Samples among this many most probable tokens.
    pub top_k: Option<usize>,
    /// Seed of the sampler; the same seed, prompt and model give the same text.
    pub seed: u64,
    /// Divides the positive logits of recent tokens, and multiplies the negative ones; 1: off.
    pub repeat_penalty: f32,
    /// How many of the last tokens, prompt included, the penalty looks at.
    pub repeat_last_n: usize,
    /// Most tokens that are generated.
    pub sample_len: usize,
    /// Tokens that end the text.
    pub eos_token_ids: BTreeSet<u32>,
}

impl Default for GenerationConfig {
    fn default() -> Self {
        Self {
            temperature: None,
            top_p: None,
            top_k: None,
            seed: 299792458,
            repeat_penalty: 1.0,
            repeat_last_n: 64,
            sample_len: 128,
            eos_token_ids: BTreeSet::new(),
        }
    }
}

impl GenerationConfig {
    /// Greedy, ending at the end-of-text tokens of `config`.
    pub fn new(config: &ModelConfig) -> Self {
        Self {
            eos_token_ids: config.eos_token_ids.clone(),
            ..Self::default()
        }
    }

    /// Takes over what a `generation_config.json` recommends: `temperature`, `top_p` and `top_k`
    /// where `do_sample` is true, `repetition_penalty`, and more end-of-text tokens.
    ///
    /// # Errors
    /// [`Error::InvalidValue`] when a key has the wrong type.
    pub fn apply(&mut self, generation_config: &Value) -> Result<()> {
        use crate::config::Reader;
        let path = "generation_config.json";
        let reader = Reader::new(generation_config, path, "generation", |_| None);
        self.eos_token_ids.extend(reader.token_ids("eos_token_id")?);
        if let Some(penalty) = reader.positive_opt("repetition_penalty")? {
            self.repeat_penalty = penalty as f32;
        }
        if reader.flag("do_sample")? {
            // What transformers samples with when the file leaves a key out.
            self.temperature = Some(reader.positive_opt("temperature")?.unwrap_or(1.0));
            self.top_p = reader.positive_opt("top_p")?.filter(|&p| p < 1.0);
            self.top_k = match reader.get("top_k").and_then(Value::as_u64) {
                Some(0) => None,
                _ => Some(reader.size_opt("top_k")?.unwrap_or(50)),
            };
        }
        Ok(())
    }

    /// Checks the ranges.
    pub(super) fn check(&self) -> Result<()> {
        let bad = |key, found: String, expected| {
            Err(Error::InvalidSetting {
                key,
                found,
                expected,
            })
        };
        match self.temperature {
            Some(t) if !(t.is_finite() && t >= 0.0) => {
                return bad("temperature", t.to_string(), "a finite number, 0 or more");
            }
            _ => {}
        }
        match self.top_p {
            Some(p) if !(p > 0.0 && p <= 1.0) => {
                return bad("top_p", p.to_string(), "more than 0, at most 1");
            }
            _ => {}
        }
        if self.top_k == Some(0) {
            return bad("top_k", "0".to_string(), "at least 1, or none");
        }
        if !(self.repeat_penalty.is_finite() && self.repeat_penalty > 0.0) {
            let found = self.repeat_penalty.to_string();
            return bad("repeat_penalty", found, "a finite number greater than 0");
        }
        Ok(())
    }

    /// Whether each token is the most probable one, by the logits as they are.
    pub(super) fn is_greedy(&self) -> bool {
        self.repeat_penalty == 1.0 && matches!(self.sampling(), Sampling::ArgMax)
    }

    /// A sampler for sequence `index` of a batch, at the start of its random stream.
    pub(super) fn sampler(&self, index: u64) -> LogitsProcessor {
        LogitsProcessor::from_sampling(self.seed.wrapping_add(index), self.sampling())
    }

    fn sampling(&self) -> Sampling {
        match (self.temperature, self.top_k, self.top_p) {
            // The same threshold as `LogitsProcessor::new`.
            (None, _, _) => Sampling::ArgMax,
            (Some(temperature), _, _) if temperature < 1e-7 => Sampling::ArgMax,
            (Some(temperature), None, None) => Sampling::All { temperature },
            (Some(temperature), Some(k), None) => Sampling::TopK { k, temperature },
            (Some(temperature), None, Some(p)) => Sampling::TopP { p, temperature },
            (Some(temperature), Some(k), Some(p)) => Sampling::TopKThenTopP { k, p, temperature },
        }
    }
}
