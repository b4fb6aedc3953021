//! Prompts and decode steps against the clock.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use candle_core::{D, DType, Tensor};
use candle_fp8_transformers::{CausalLm, KvCache};
use serde::Serialize;

use super::fill;
use super::traffic::Traffic;

/// A prompt is timed this often …
const PREFILL_RUNS: usize = 3;
/// … or less often once so much time has gone.
const PREFILL_TIME: Duration = Duration::from_secs(5);

/// One prompt.
#[derive(Serialize)]
pub(crate) struct Prefill {
    /// Its length.
    pub(crate) tokens: usize,
    /// Prompt tokens a second.
    pub(crate) tok_s: f64,
}

/// One run of decode steps.
#[derive(Serialize)]
pub(crate) struct Decode {
    /// Sequences.
    pub(crate) batch: usize,
    /// Positions in the cache before the first step.
    pub(crate) context: usize,
    /// Steps: tokens of each sequence.
    pub(crate) tokens: usize,
    /// Tokens a second, of all sequences together.
    pub(crate) tok_s: f64,
    /// Bytes that a step reads, divided by the sequences; the mean over the steps.
    pub(crate) bytes_per_token: f64,
    /// `tok_s · bytes_per_token`, in 10⁹ bytes a second.
    pub(crate) gb_s: f64,
}

/// Times a prompt of random tokens, up to and including the read-back of the token sampled after it. The median of
/// three runs, or of fewer if they take long; caches are made before, and there was a short prompt to warm up.
pub(crate) fn prefill(model: &CausalLm, tokens: usize) -> Result<Prefill> {
    let ids = random_ids(model, 1, tokens)?;
    let warm_up = ids.narrow(1, 0, tokens.min(8))?.contiguous()?;
    let mut cache = model.new_cache(1, tokens)?;
    model.forward(&warm_up, &mut cache)?;

    let begin = Instant::now();
    let mut times = Vec::new();
    while times.len() < PREFILL_RUNS && (times.is_empty() || begin.elapsed() < PREFILL_TIME) {
        cache.reset();
        let mut sampler = Sampler::default();
        let start = Instant::now();
        sampler.sample(&model.forward(&ids, &mut cache)?)?;
        times.push(start.elapsed());
        sampler.check("after the prompt")?;
    }
    times.sort_unstable();
    Ok(Prefill {
        tokens,
        tok_s: tokens as f64 / times[times.len() / 2].as_secs_f64(),
    })
}

/// Times `tokens` greedy steps of `batch` sequences, each of which has `context` (at least 1) random positions in the
/// cache when the clock starts. The last of them is a step of its own: it warms up what prompts do not use.
pub(crate) fn decode(
    model: &CausalLm,
    batch: usize,
    context: usize,
    tokens: usize,
) -> Result<Decode> {
    let mut cache = model.new_cache(batch, context + tokens)?;
    let ids = random_ids(model, batch, context)?;
    let mut sampler = Sampler::default();
    if context > 1 {
        let prompt = ids.narrow(1, 0, context - 1)?.contiguous()?;
        model.forward(&prompt, &mut cache)?;
    }
    let last = ids.narrow(1, context - 1, 1)?.contiguous()?;
    let mut next = sampler.sample(&model.forward(&last, &mut cache)?)?;

    let start = Instant::now();
    for _ in 0..tokens {
        next = step(model, next, &mut cache, &mut sampler)?;
    }
    let time = start.elapsed().as_secs_f64();
    sampler.check("while decoding")?;

    let traffic = Traffic::of(model, batch);
    let steps = (0..tokens).map(|step| traffic.step_bytes(context + step));
    let bytes_per_token = steps.sum::<f64>() / (tokens * batch) as f64;
    let tok_s = (tokens * batch) as f64 / time;
    Ok(Decode {
        batch,
        context,
        tokens,
        tok_s,
        bytes_per_token,
        gb_s: tok_s * bytes_per_token / 1e9,
    })
}

fn step(
    model: &CausalLm,
    tokens: Vec<u32>,
    cache: &mut KvCache,
    sampler: &mut Sampler,
) -> Result<Vec<u32>> {
    let ids = Tensor::new(tokens, model.device())?.unsqueeze(1)?;
    sampler.sample(&model.forward(&ids, cache)?)
}

/// `[batch, len]`, the same in every run, different in every sequence.
fn random_ids(model: &CausalLm, batch: usize, len: usize) -> Result<Tensor> {
    let mut ids = vec![0u32; batch * len];
    let vocab = model.config().vocab_size as u64;
    fill::words(&mut ids, 1, fill::seed("prompt"), |word, id| {
        id[0] = (word % vocab) as u32;
    });
    Ok(Tensor::from_vec(ids, (batch, len), model.device())?)
}

/// Greedy sampling on the device. The sums of the logits are kept there until the clock has stopped.
#[derive(Default)]
struct Sampler {
    sums: Vec<Tensor>,
}

impl Sampler {
    /// Logits `[B, V]` → the most probable token of each sequence, read back.
    fn sample(&mut self, logits: &Tensor) -> Result<Vec<u32>> {
        // NaN and infinity survive addition.
        self.sums.push(logits.sum_all()?.to_dtype(DType::F32)?);
        Ok(logits.argmax(D::Minus1)?.to_vec1()?)
    }

    /// Errs if any logit that was sampled from is not finite.
    fn check(&self, when: &str) -> Result<()> {
        let sums = Tensor::stack(&self.sums, 0)?.to_vec1::<f32>();
        for (step, sum) in sums.context("reading the logits' sums")?.iter().enumerate() {
            ensure!(
                sum.is_finite(),
                "logits {when} are not finite (they sum to {sum} in step {step}): this is no measurement"
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn sampling_takes_the_largest_and_notices_what_is_not_finite() {
        let mut sampler = Sampler::default();
        let logits = Tensor::new(&[[0f32, 3., 1.], [5., -7., 4.]], &Device::Cpu).unwrap();
        assert_eq!(sampler.sample(&logits).unwrap(), [1, 0]);
        sampler.check("here").unwrap();
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut sampler = Sampler::default();
            sampler.sample(&logits).unwrap();
            let logits = Tensor::new(&[[0f32, 3., 1.], [5., bad, 4.]], &Device::Cpu).unwrap();
            sampler.sample(&logits).unwrap();
            let error = sampler.check("here").unwrap_err().to_string();
            assert!(error.contains("not finite"), "{error}");
        }
    }
}
