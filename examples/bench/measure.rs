//! Prompts and decode steps against the clock.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use candle_core::{D, DType, Device, Tensor};
use candle_fp8_transformers::{CausalLm, Greedy, KvCache};

use super::fill;

/// A prompt is timed this often …
const PREFILL_RUNS: usize = 3;
/// … or less often once so much time has gone.
const PREFILL_TIME: Duration = Duration::from_secs(5);

/// A model that is timed: ours, or a peer.
pub(crate) trait Subject {
    /// What it keeps of the positions that it has seen.
    type Cache;

    /// An empty cache for `positions` positions of `batch` sequences.
    fn cache(&self, batch: usize, positions: usize) -> Result<Self::Cache>;

    /// Forgets every position.
    fn reset(&self, cache: &mut Self::Cache) -> Result<()>;

    /// Logits `[B, V]` after `ids [B, L]`, which follow the positions in the cache and join them.
    fn forward(&self, ids: &Tensor, cache: &mut Self::Cache) -> Result<Tensor>;

    /// The most probable token of each sequence after `tokens`, one of each, which follow those in the cache.
    fn greedy(
        &self,
        tokens: &[u32],
        cache: &mut Self::Cache,
        sampler: &mut Sampler,
    ) -> Result<Vec<u32>> {
        let ids = column(tokens, self.device())?;
        sampler.sample(&self.forward(&ids, cache)?)
    }

    /// Tokens that there are.
    fn vocab_size(&self) -> usize;

    /// Where it runs.
    fn device(&self) -> &Device;
}

impl Subject for CausalLm {
    type Cache = KvCache;

    fn cache(&self, batch: usize, positions: usize) -> Result<KvCache> {
        Ok(self.new_cache(batch, positions)?)
    }

    fn reset(&self, cache: &mut KvCache) -> Result<()> {
        cache.reset();
        Ok(())
    }

    fn forward(&self, ids: &Tensor, cache: &mut KvCache) -> Result<Tensor> {
        Ok(CausalLm::forward(self, ids, cache)?)
    }

    fn greedy(
        &self,
        tokens: &[u32],
        cache: &mut KvCache,
        sampler: &mut Sampler,
    ) -> Result<Vec<u32>> {
        Ok(sampler.take(self.forward_greedy(tokens, cache)?))
    }

    fn vocab_size(&self) -> usize {
        self.config().vocab_size
    }

    fn device(&self) -> &Device {
        CausalLm::device(self)
    }
}

/// Prompt tokens a second: a prompt of random tokens, up to and including the read-back of the token sampled after it.
/// The median of three runs, or of fewer if they take long; caches are made before, and there was a short prompt to warm
/// up.
pub(crate) fn prefill<S: Subject>(model: &S, tokens: usize) -> Result<f64> {
    let ids = random_ids(model, 1, tokens)?;
    let warm_up = ids.narrow(1, 0, tokens.min(8))?.contiguous()?;
    let mut cache = model.cache(1, tokens)?;
    model.forward(&warm_up, &mut cache)?;

    let begin = Instant::now();
    let mut times = Vec::new();
    while times.len() < PREFILL_RUNS && (times.is_empty() || begin.elapsed() < PREFILL_TIME) {
        model.reset(&mut cache)?;
        let mut sampler = Sampler::default();
        let start = Instant::now();
        sampler.sample(&model.forward(&ids, &mut cache)?)?;
        times.push(start.elapsed());
        sampler.check("after the prompt")?;
    }
    times.sort_unstable();
    Ok(tokens as f64 / times[times.len() / 2].as_secs_f64())
}

/// Tokens a second of all sequences together: `tokens` greedy steps of `batch` sequences, each of which has `context` (at
/// least 1) random positions in the cache when the clock starts. The clock stands still while `pause` runs, after each
/// step.
pub(crate) fn decode<S: Subject>(
    model: &S,
    batch: usize,
    context: usize,
    tokens: usize,
    mut pause: impl FnMut(),
) -> Result<f64> {
    let mut cache = model.cache(batch, context + tokens)?;
    let mut sampler = Sampler::default();
    let mut next = fill_cache(model, batch, context, &mut cache, &mut sampler)?;
    let mut time = Duration::ZERO;
    for _ in 0..tokens {
        let start = Instant::now();
        next = model.greedy(&next, &mut cache, &mut sampler)?;
        time += start.elapsed();
        pause();
    }
    sampler.check("while decoding")?;
    Ok((tokens * batch) as f64 / time.as_secs_f64())
}

/// Puts `context` (at least 1) random positions of `batch` sequences into an empty cache; gives the token sampled after
/// each. The last position is a step of its own: it warms up what prompts do not use.
pub(crate) fn fill_cache<S: Subject>(
    model: &S,
    batch: usize,
    context: usize,
    cache: &mut S::Cache,
    sampler: &mut Sampler,
) -> Result<Vec<u32>> {
    let ids = random_ids(model, batch, context)?;
    if context > 1 {
        let prompt = ids.narrow(1, 0, context - 1)?.contiguous()?;
        model.forward(&prompt, cache)?;
    }
    let last = ids.narrow(1, context - 1, 1)?.flatten_all()?.to_vec1()?;
    model.greedy(&last, cache, sampler)
}

/// The tokens of a decode step: `[batch, 1]`.
pub(crate) fn column(tokens: &[u32], device: &Device) -> Result<Tensor> {
    Ok(Tensor::new(tokens, device)?.unsqueeze(1)?)
}

/// `[batch, len]`, the same in every run, different in every sequence.
pub(crate) fn random_ids<S: Subject>(model: &S, batch: usize, len: usize) -> Result<Tensor> {
    let mut ids = vec![0u32; batch * len];
    let vocab = model.vocab_size() as u64;
    fill::words(&mut ids, 1, fill::seed("prompt"), |word, id| {
        id[0] = (word % vocab) as u32;
    });
    Ok(Tensor::from_vec(ids, (batch, len), model.device())?)
}

/// Greedy sampling on the device. The sums of the logits are kept there until the clock has stopped, where the model has
/// not looked at them itself.
#[derive(Default)]
pub(crate) struct Sampler {
    sums: Vec<Tensor>,
    /// Of what the model has chosen.
    not_finite: usize,
}

impl Sampler {
    /// Logits `[B, V]` → the most probable token of each sequence, read back.
    pub(crate) fn sample(&mut self, logits: &Tensor) -> Result<Vec<u32>> {
        // NaN and infinity survive addition.
        self.sums.push(logits.sum_all()?.to_dtype(DType::F32)?);
        Ok(logits.argmax(D::Minus1)?.to_vec1()?)
    }

    /// What the model has chosen.
    fn take(&mut self, greedy: Greedy) -> Vec<u32> {
        self.not_finite += usize::from(!greedy.finite);
        greedy.tokens
    }

    /// Errs if any logit that was sampled from is not finite.
    pub(crate) fn check(&self, when: &str) -> Result<()> {
        ensure!(
            self.not_finite == 0,
            "logits {when} are not finite in {} of the steps: this is no measurement",
            self.not_finite
        );
        if self.sums.is_empty() {
            return Ok(());
        }
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

    #[test]
    fn sampling_takes_the_largest_and_notices_what_is_not_finite() {
        let mut sampler = Sampler::default();
        let logits = Tensor::new(&[[0f32, 3., 1.], [5., -7., 4.]], &Device::Cpu).unwrap();
        assert_eq!(sampler.sample(&logits).unwrap(), [1, 0]);
        sampler.check("here").unwrap();
        for finite in [true, false] {
            let tokens = vec![7];
            assert_eq!(sampler.take(Greedy { tokens, finite }), [7]);
            assert_eq!(sampler.check("here").is_ok(), finite);
        }
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
