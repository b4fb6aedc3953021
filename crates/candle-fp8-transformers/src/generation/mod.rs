//! The generation loop, on token ids.

mod config;

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use candle_core::{Device, Tensor};
use candle_transformers::generation::LogitsProcessor;
use candle_transformers::utils::apply_repeat_penalty;

pub use config::GenerationConfig;

use crate::{CausalLm, Error, KvCache, Result};

/// Generates text with a model, on token ids: tokenizers stay with the caller.
///
/// Owns a KV cache of fixed capacity, which is reused from one prompt to the next.
#[derive(Debug)]
pub struct TextGeneration<'m> {
    model: &'m CausalLm,
    config: GenerationConfig,
    cache: KvCache,
}

/// Tokens and times of a generation.
///
/// The first token is sampled from the prompt's logits, so its cost is in `prompt`; `generation`
/// covers the forward passes of the others, sampling and read-back included.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Timings {
    /// Tokens of the prompt (of all sequences).
    pub prompt_tokens: usize,
    /// Time to process the prompt and sample the first token.
    pub prompt: Duration,
    /// Forward passes after the prompt's, times the sequences in the batch.
    pub generated_tokens: usize,
    /// Time of these.
    pub generation: Duration,
}

impl Timings {
    /// Prompt tokens per second.
    pub fn prompt_tokens_per_second(&self) -> f64 {
        rate(self.prompt_tokens, self.prompt)
    }

    /// Generated tokens per second; 0 when there was no forward pass after the prompt's.
    pub fn generated_tokens_per_second(&self) -> f64 {
        rate(self.generated_tokens, self.generation)
    }
}

fn rate(tokens: usize, time: Duration) -> f64 {
    match time.as_secs_f64() {
        seconds if seconds > 0.0 => tokens as f64 / seconds,
        _ => 0.0,
    }
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// The model sampled this end-of-text token, which is not among the tokens given out.
    Eos(u32),
    /// `sample_len` tokens were generated.
    Length,
    /// The caller stopped.
    Stopped,
}

/// A finished generation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Generated {
    /// The generated ids, without the prompt and without the end-of-text token.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Counts and times.
    pub timings: Timings,
}

impl<'m> TextGeneration<'m> {
    /// A generator whose prompts and generated tokens together fit `max_seq` positions.
    ///
    /// # Errors
    /// [`Error::InvalidSetting`] for settings outside their range; else those of
    /// [`KvCache::new`].
    pub fn new(model: &'m CausalLm, config: GenerationConfig, max_seq: usize) -> Result<Self> {
        config.check()?;
        let cache = model.new_cache(1, max_seq)?;
        Ok(Self {
            model,
            config,
            cache,
        })
    }

    /// Processes `prompt` and gives an iterator over the tokens that follow it.
    ///
    /// # Errors
    /// [`Error::CacheFull`] when the prompt does not fit, [`Error::Mismatch`] when it is empty or has
    /// a token outside the vocabulary, [`Error::NonFiniteLogits`] when the model's arithmetic breaks
    /// down. The iterator itself yields that one too, and [`Error::CacheFull`] when the generation
    /// outgrows `max_seq`: the tokens given out before stay valid, and so does the generator.
    pub fn stream(&mut self, prompt: &[u32]) -> Result<TokenStream<'_>> {
        self.cache.reset();
        let start = Instant::now();
        (self.model).check_tokens([1, prompt.len()], prompt, &self.cache)?;
        let ids = Tensor::new(prompt, self.model.device())?.unsqueeze(0)?;
        let logits = self.model.forward(&ids, &mut self.cache)?.squeeze(0)?;
        let mut sequence = Sequence::new(&self.config, prompt, 0);
        sequence.push(&logits, &self.config, self.model)?;
        Ok(TokenStream {
            model: self.model,
            config: &self.config,
            cache: &mut self.cache,
            sequence,
            timings: Timings {
                prompt_tokens: prompt.len(),
                prompt: start.elapsed(),
                ..Timings::default()
            },
            given: 0,
            failed: false,
        })
    }

    /// Generates to the end, handing each token to `on_token` as it comes; the callback can stop
    /// the generation by returning [`ControlFlow::Break`].
    ///
    /// # Errors
    /// Those of [`stream`](Self::stream).
    pub fn generate(
        &mut self,
        prompt: &[u32],
        mut on_token: impl FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Generated> {
        let mut stream = self.stream(prompt)?;
        let mut tokens = Vec::new();
        let mut stopped = false;
        while !stopped && let Some(token) = stream.next() {
            let token = token?;
            tokens.push(token);
            stopped = on_token(token).is_break();
        }
        Ok(Generated {
            tokens,
            finish_reason: match stopped {
                true => FinishReason::Stopped,
                false => stream.finish_reason().unwrap_or(FinishReason::Length),
            },
            timings: stream.timings(),
        })
    }

    /// Generates for several prompts of equal length at once, in one batch. Sequence i samples with
    /// seed `seed + i`; ended sequences are carried along until all have ended. The timings in
    /// each result are those of the whole batch.
    ///
    /// # Errors
    /// [`Error::Mismatch`] when there is no prompt, one is empty, or they differ in length; else those of
    /// [`stream`](Self::stream).
    pub fn generate_batch(&mut self, prompts: &[&[u32]]) -> Result<Vec<Generated>> {
        let len = prompts.first().map_or(0, |prompt| prompt.len());
        if len == 0 || prompts.iter().any(|prompt| prompt.len() != len) {
            return Err(Error::Mismatch {
                what: "lengths of the prompts in a batch",
                expected: "all equal and at least 1 (there is no padding)".to_string(),
                found: format!("{:?}", prompts.iter().map(|p| p.len()).collect::<Vec<_>>()),
            });
        }
        let (model, config) = (self.model, &self.config);
        let mut cache = model.new_cache(prompts.len(), self.cache.max_seq())?;
        let mut sequences: Vec<_> = (0u64..)
            .zip(prompts)
            .map(|(index, prompt)| Sequence::new(config, prompt, index))
            .collect();
        let mut timings = Timings {
            prompt_tokens: len * prompts.len(),
            ..Timings::default()
        };
        let start = Instant::now();
        let ids = prompts.concat();
        model.check_tokens([prompts.len(), len], &ids, &cache)?;
        let ids = Tensor::new(ids, model.device())?.reshape((prompts.len(), len))?;
        let mut next = Next::Logits(model.forward(&ids, &mut cache)?);
        let mut prompt_end = None;
        loop {
            for (row, sequence) in sequences.iter_mut().enumerate() {
                if sequence.finished(config).is_some() {
                    continue;
                }
                match &next {
                    Next::Logits(logits) => sequence.push(&logits.get(row)?, config, model)?,
                    Next::Tokens(tokens) => sequence.tokens.push(tokens[row]),
                }
            }
            let prompt_end = *prompt_end.get_or_insert_with(Instant::now);
            timings.prompt = prompt_end - start;
            timings.generation = prompt_end.elapsed();
            if sequences
                .iter()
                .all(|sequence| sequence.finished(config).is_some())
            {
                break;
            }
            let last: Vec<u32> = sequences.iter().map(Sequence::last).collect();
            next = if config.is_greedy() {
                Next::Tokens(greedy(model, &last, &mut cache)?)
            } else {
                let ids = Tensor::new(last, model.device())?.unsqueeze(1)?;
                Next::Logits(model.forward(&ids, &mut cache)?)
            };
            timings.generated_tokens += prompts.len();
        }
        let generated = |mut sequence: Sequence| {
            let finish_reason = sequence.finished(config).unwrap_or(FinishReason::Length);
            let mut tokens = sequence.tokens.split_off(sequence.prompt_len);
            if let FinishReason::Eos(_) = finish_reason {
                tokens.pop();
            }
            Generated {
                tokens,
                finish_reason,
                timings,
            }
        };
        Ok(sequences.into_iter().map(generated).collect())
    }

    /// The settings.
    pub fn config(&self) -> &GenerationConfig {
        &self.config
    }

    /// Positions that a prompt and its continuation may take together.
    pub fn max_seq(&self) -> usize {
        self.cache.max_seq()
    }
}

/// The tokens after a prompt, computed one by one as they are asked for. Ends before an end-of-text
/// token, after `sample_len` tokens, or after an error.
pub struct TokenStream<'g> {
    model: &'g CausalLm,
    config: &'g GenerationConfig,
    cache: &'g mut KvCache,
    sequence: Sequence,
    timings: Timings,
    /// Generated tokens that were given out.
    given: usize,
    failed: bool,
}

impl TokenStream<'_> {
    /// Counts and times so far.
    pub fn timings(&self) -> Timings {
        self.timings
    }

    /// Why the stream ended; `None` while it has not, and after an error.
    pub fn finish_reason(&self) -> Option<FinishReason> {
        match self.sequence.finished(self.config) {
            Some(FinishReason::Length) if self.given < self.config.sample_len => None,
            reason => reason,
        }
    }

    /// Runs the last token through the model and samples the next one.
    fn step(&mut self) -> Result<()> {
        let start = Instant::now();
        let last = self.sequence.last();
        if self.config.is_greedy() {
            let next = greedy(self.model, &[last], self.cache)?;
            self.sequence.tokens.extend(next);
        } else {
            let ids = Tensor::new(&[[last]], self.model.device())?;
            let logits = self.model.forward(&ids, self.cache)?.squeeze(0)?;
            self.sequence.push(&logits, self.config, self.model)?;
        }
        self.timings.generated_tokens += 1;
        self.timings.generation += start.elapsed();
        Ok(())
    }
}

impl Iterator for TokenStream<'_> {
    type Item = Result<u32>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed || self.given == self.config.sample_len {
            return None;
        }
        // All sampled tokens were given out: one more is needed.
        if self.given == self.sequence.generated()
            && let Err(error) = self.step()
        {
            self.failed = true;
            return Some(Err(error));
        }
        if let Some(FinishReason::Eos(_)) = self.sequence.finished(self.config) {
            return None;
        }
        self.given += 1;
        Some(Ok(self.sequence.last()))
    }
}

/// What a step of a batch has given.
enum Next {
    /// `[B, V]`, to sample from.
    Logits(Tensor),
    /// The most probable ones.
    Tokens(Vec<u32>),
}

/// One text: prompt and generated tokens, an end-of-text token included, and its sampler.
struct Sequence {
    tokens: Vec<u32>,
    prompt_len: usize,
    sampler: LogitsProcessor,
}

impl Sequence {
    fn new(config: &GenerationConfig, prompt: &[u32], index: u64) -> Self {
        Self {
            tokens: prompt.to_vec(),
            prompt_len: prompt.len(),
            sampler: config.sampler(index),
        }
    }

    fn generated(&self) -> usize {
        self.tokens.len() - self.prompt_len
    }

    /// The newest token. Prompts are not empty: the model has refused those.
    fn last(&self) -> u32 {
        self.tokens[self.tokens.len() - 1]
    }

    /// Samples the next token from logits `[V]`, which have to be finite: samplers would take a token all the same.
    fn push(&mut self, logits: &Tensor, config: &GenerationConfig, model: &CausalLm) -> Result<()> {
        // Both the check and the sampler look at them on the host: they are copied once.
        let logits = logits.to_vec1::<f32>()?;
        if logits.iter().any(|logit| !logit.is_finite()) {
            return Err(non_finite(self.tokens.len(), model));
        }
        let logits = Tensor::new(logits, &Device::Cpu)?;
        let token = if config.repeat_penalty == 1.0 {
            self.sampler.sample(&logits)?
        } else {
            let recent = self.tokens.len().saturating_sub(config.repeat_last_n);
            let penalized =
                apply_repeat_penalty(&logits, config.repeat_penalty, &self.tokens[recent..])?;
            self.sampler.sample(&penalized)?
        };
        self.tokens.push(token);
        Ok(())
    }

    fn finished(&self, config: &GenerationConfig) -> Option<FinishReason> {
        if self.generated() > 0 && config.eos_token_ids.contains(&self.last()) {
            Some(FinishReason::Eos(self.last()))
        } else if self.generated() >= config.sample_len {
            Some(FinishReason::Length)
        } else {
            None
        }
    }
}

/// The most probable token of each sequence after `tokens`.
fn greedy(model: &CausalLm, tokens: &[u32], cache: &mut KvCache) -> Result<Vec<u32>> {
    let next = model.forward_greedy(tokens, cache)?;
    match next.finite {
        true => Ok(next.tokens),
        false => Err(non_finite(cache.len(), model)),
    }
}

fn non_finite(positions: usize, model: &CausalLm) -> Error {
    Error::NonFiniteLogits {
        positions,
        dtype: model.dtype().as_str(),
    }
}
