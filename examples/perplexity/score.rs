//! Negative log-likelihoods of a text, window by window.

use anyhow::{Context, Result, ensure};
use candle_core::{IndexOp, Tensor};
use candle_fp8_transformers::CausalLm;

/// Logits that are held at a time, where a window may be cut.
const CHUNK_BYTES: usize = 256 << 20;

/// What a text came to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Score {
    /// Tokens that were predicted.
    pub(crate) scored: usize,
    /// Sum of `-ln p` over them.
    pub(crate) nll: f64,
}

impl Score {
    /// Mean negative log-likelihood, in nats.
    pub(crate) fn mean_nll(&self) -> f64 {
        self.nll / self.scored as f64
    }

    /// `exp` of the mean.
    pub(crate) fn perplexity(&self) -> f64 {
        self.mean_nll().exp()
    }
}

/// How a text goes through a model.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Passes {
    /// Tokens of a window; the last one may be shorter.
    pub(crate) window: usize,
    /// Most tokens of a forward pass. A window of more takes several, over one KV cache.
    pub(crate) chunk: usize,
}

impl Passes {
    /// Windows of `window` tokens. They are cut so that the logits of a pass stay within 256 MiB, unless `whole` asks for
    /// one pass a window: inputs that are quantized per tensor depend on all that pass together.
    pub(crate) fn new(window: usize, vocab: usize, whole: bool) -> Self {
        let fitting = CHUNK_BYTES / (4 * vocab.max(1));
        let chunk = match whole {
            true => window,
            false => fitting.clamp(1, window),
        };
        Self { window, chunk }
    }
}

/// Scores `ids`: every token of a window but the first, given all tokens of the window before it.
///
/// `each` gets the logits of every token in order, some rows `[n, V]` in F32 at a time; `done` the number of tokens that
/// have been through.
pub(crate) fn score(
    model: &CausalLm,
    ids: &[u32],
    passes: Passes,
    mut each: impl FnMut(&Tensor) -> Result<()>,
    mut done: impl FnMut(usize),
) -> Result<Score> {
    let mut cache = model.new_cache(1, passes.window.min(ids.len()))?;
    let mut score = Score { scored: 0, nll: 0. };
    let mut position = 0;
    for window in ids.chunks(passes.window) {
        cache.reset();
        let mut start = 0;
        for chunk in window.chunks(passes.chunk) {
            let input = Tensor::new(chunk, model.device())?.unsqueeze(0)?;
            let logits = model.forward_all(&input, &mut cache)?.i(0)?;
            each(&logits)?;
            // The row of token i predicts token i + 1 of the window; the window's last row predicts none.
            let targets = &window[start + 1..window.len().min(start + chunk.len() + 1)];
            for (row, &target) in targets.iter().enumerate() {
                let logits = logits.i(row)?.to_vec1::<f32>()?;
                let nll = negative_log_likelihood(&logits, target as usize)
                    .with_context(|| format!("at token {}", position + row))?;
                score.nll += nll;
                score.scored += 1;
            }
            start += chunk.len();
            position += chunk.len();
            done(position);
        }
    }
    Ok(score)
}

/// `-ln softmax(logits)[target]` in f64.
fn negative_log_likelihood(logits: &[f32], target: usize) -> Result<f64> {
    let target = *logits
        .get(target)
        .with_context(|| format!("token id {target}, but {} logits", logits.len()))?;
    ensure!(
        logits.iter().all(|logit| logit.is_finite()),
        "the logits are not finite: the dtype cannot hold this model's activations (try --dtype bf16 or f32), or its \
         weights are damaged"
    );
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits
        .iter()
        .map(|&logit| (f64::from(logit) - f64::from(largest)).exp())
        .sum();
    Ok(sum.ln() + f64::from(largest) - f64::from(target))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn likelihoods_are_those_of_the_softmax() {
        let logits = [1.0f32, 2.0, 4.0];
        let total: f64 = [1f64, 2., 4.].iter().map(|x| x.exp()).sum();
        for (target, logit) in [1f64, 2., 4.].into_iter().enumerate() {
            let expected = -(logit.exp() / total).ln();
            let found = negative_log_likelihood(&logits, target).unwrap();
            assert!((found - expected).abs() < 1e-15, "{found} {expected}");
        }
        // Far beyond what exp holds, and far below what a probability in f32 holds.
        let found = negative_log_likelihood(&[3000., 0., 3000.], 1).unwrap();
        assert!((found - (3000. + 2f64.ln())).abs() < 1e-12, "{found}");
    }

    #[test]
    fn what_is_not_finite_is_an_error() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let error = negative_log_likelihood(&[0., bad, 1.], 0).unwrap_err();
            assert!(error.to_string().contains("not finite"));
        }
        assert!(negative_log_likelihood(&[0., 1.], 2).is_err());
    }

    #[test]
    fn passes_over_one_cache_are_the_same_as_one() {
        use candle_compressed_tensors::{Checkpoint, LoadOptions, QuantizerCompressedTensors};
        use candle_core::{DType, Device};
        use candle_fp8_transformers::ModelConfig;
        let dir = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/tests/checkpoints/llama-channel-token"
        );
        let checkpoint = Checkpoint::open(dir).unwrap();
        let quantizer =
            QuantizerCompressedTensors::new(&checkpoint, LoadOptions::default()).unwrap();
        let config = ModelConfig::from_json(checkpoint.config()).unwrap();
        let vb = quantizer.var_builder(DType::F32, &Device::Cpu).unwrap();
        let model = CausalLm::load(&config, &quantizer, vb).unwrap();

        let ids: Vec<u32> = (0..23).map(|i| i * i % 97).collect();
        let run = |window, chunk| {
            let (mut rows, mut done) = (Vec::new(), Vec::new());
            let keep = |logits: &Tensor| {
                rows.extend(logits.to_vec2::<f32>()?);
                Ok(())
            };
            let passes = Passes { window, chunk };
            let score = score(&model, &ids, passes, keep, |position| done.push(position));
            (score.unwrap(), rows, done)
        };
        let (whole, rows, done) = run(10, 10);
        assert_eq!(whole.scored, 9 + 9 + 2);
        assert_eq!(rows.len(), 23);
        assert_eq!(done, [10, 20, 23]);
        for chunk in [1, 3, 9] {
            let (cut, cut_rows, _) = run(10, chunk);
            assert_eq!(cut.scored, whole.scored);
            assert!((cut.nll - whole.nll).abs() < 1e-3 * whole.nll, "{chunk}");
            let pairs = rows.iter().flatten().zip(cut_rows.iter().flatten());
            let error = pairs.map(|(a, b)| (a - b).abs()).fold(0., f32::max);
            assert!(error < 1e-2, "{chunk}: {error}");
        }
    }

    #[test]
    fn windows_are_cut_by_the_size_of_their_logits() {
        let chunk = |window, vocab, whole| Passes::new(window, vocab, whole).chunk;
        assert_eq!(chunk(2048, 512, false), 2048);
        assert_eq!(chunk(8192, 128_256, false), 523);
        assert_eq!(chunk(8192, 128_256, true), 8192);
        assert_eq!(chunk(16, usize::MAX / 8, false), 1);
    }
}
