//! Greedy steps: the largest of the logits that a step without a choice gives, from the same cache, in any order.

use candle_core::{DType, Device, Result, Tensor};
use candle_fp8::{Quantization, ScaleLayout};
use candle_fp8_transformers::{CausalLm, Error, GenerationConfig, KvCache, TextGeneration};
use serde_json::json;

use crate::{devices, made_up, support};

const PROMPT: usize = 10;
const STEPS: usize = 9;

/// The first of the largest logits of each row, and how many are as large.
fn largest(logits: &Tensor) -> Result<Vec<(u32, usize)>> {
    let row = |row: Vec<f64>| {
        let most = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let at = row
            .iter()
            .position(|logit| *logit == most)
            .expect("a number");
        (
            at as u32,
            row.iter().filter(|logit| **logit == most).count(),
        )
    };
    let rows = support::rows(&logits.to_device(&Device::Cpu)?);
    Ok(rows.into_iter().map(row).collect())
}

fn prompt(model: &CausalLm, batch: usize, max_seq: usize) -> Result<(KvCache, Vec<u32>)> {
    let vocab = model.config().vocab_size as u32;
    let ids: Vec<u32> = (0..(batch * PROMPT) as u32)
        .map(|i| (i * i * 7 + i) % vocab)
        .collect();
    let ids = Tensor::from_vec(ids, (batch, PROMPT), model.device())?;
    let mut cache = model.new_cache(batch, max_seq).expect("a cache");
    let logits = model.forward(&ids, &mut cache).expect("a prompt");
    let first = largest(&logits)?.into_iter().map(|(id, _)| id).collect();
    Ok((cache, first))
}

/// Logits `[B, V]` of a step without a choice.
fn logits(model: &CausalLm, tokens: &[u32], cache: &mut KvCache) -> Result<Tensor> {
    let ids = Tensor::new(tokens, model.device())?.unsqueeze(1)?;
    model
        .forward(&ids, cache)
        .expect("a step")
        .to_device(&Device::Cpu)
}

fn greedy(model: &CausalLm, tokens: &[u32], cache: &mut KvCache) -> Vec<u32> {
    let greedy = model.forward_greedy(tokens, cache).expect("a step");
    assert!(greedy.finite);
    greedy.tokens
}

/// `launched` is whether the choice is one of the launches.
fn check(what: &str, model: &CausalLm, batch: usize, launched: bool) -> Result<()> {
    let max_seq = PROMPT + STEPS;
    // By logits: tokens that went in, and logits after them.
    let (mut cache, first) = prompt(model, batch, max_seq)?;
    let mut tokens = vec![first];
    let mut all = Vec::new();
    for step in 0..STEPS {
        let logits = logits(model, &tokens[step], &mut cache)?;
        let next = largest(&logits)?;
        // Candle's choice on a GPU may be any of equal ones.
        if !launched && next.iter().any(|(_, equal)| *equal > 1) {
            println!("{what}: equal logits in step {step}, nothing compared");
            return Ok(());
        }
        tokens.push(next.into_iter().map(|(id, _)| id).collect());
        all.push(support::rows(&logits));
    }
    let ids = |step: usize| &tokens[step][..];
    // A row of greedy steps, twice: replayed from the second step on.
    let (mut cache, _) = prompt(model, batch, max_seq)?;
    for run in 0..2 {
        cache.truncate(PROMPT);
        let mut last = tokens[0].clone();
        for step in 0..STEPS {
            last = greedy(model, &last, &mut cache);
            assert_eq!(last, tokens[step + 1], "{what}, run {run}, step {step}");
            assert_eq!(cache.len(), PROMPT + step + 1, "{what}");
        }
        let full = model.forward_greedy(&last, &mut cache);
        assert!(
            matches!(full, Err(Error::CacheFull { .. })),
            "{what}: {full:?}"
        );
        assert_eq!(cache.len(), max_seq, "{what}");
    }
    // Both kinds in turns, with each order of two and three of them.
    cache.truncate(PROMPT);
    for (step, chooses) in [1, 0, 1, 1, 0, 0, 1, 0, 0].into_iter().enumerate() {
        if chooses == 1 {
            let found = greedy(model, ids(step), &mut cache);
            assert_eq!(found, ids(step + 1), "{what}, in turns, step {step}");
        } else {
            let found = support::rows(&logits(model, ids(step), &mut cache)?);
            assert_eq!(found, all[step], "{what}, in turns, step {step}");
        }
    }
    // Back and forth, and other tokens than the last ones chosen.
    for step in [5, 6, 2, 3, 8, 2, 0] {
        cache.truncate(PROMPT + step);
        if cache.len() < PROMPT + step {
            // Cut off by an earlier one.
            for at in cache.len() - PROMPT..step {
                greedy(model, ids(at), &mut cache);
            }
        }
        let other: Vec<u32> = ids(step).iter().map(|id| (id + 1) % 300).collect();
        greedy(model, &other, &mut cache);
        cache.truncate(PROMPT + step);
        let found = greedy(model, ids(step), &mut cache);
        assert_eq!(found, ids(step + 1), "{what}, again at step {step}");
    }
    // Refused, and nothing has changed.
    cache.truncate(PROMPT);
    let vocab = model.config().vocab_size as u32;
    for wrong in [vec![vocab; batch], vec![1; batch + 1], vec![]] {
        let refused = model.forward_greedy(&wrong, &mut cache);
        assert!(
            matches!(refused, Err(Error::Mismatch { .. })),
            "{what}: {refused:?}"
        );
        assert_eq!(cache.len(), PROMPT, "{what}");
    }
    assert_eq!(
        greedy(model, ids(0), &mut cache),
        ids(1),
        "{what}, after refusals"
    );
    Ok(())
}

#[test]
fn greedy_steps_take_the_largest_logits() -> Result<()> {
    let Some(device) = devices::gpu() else {
        return Ok(());
    };
    let block = ScaleLayout::Block {
        rows: 128,
        cols: 128,
    };
    let schemes = [
        (ScaleLayout::Channel, Some(Quantization::PerToken)),
        (ScaleLayout::Tensor, Some(Quantization::Static(0.02))),
        (block, Some(Quantization::PerGroup(128))),
        (ScaleLayout::Channel, None),
        // These have no launch.
        (ScaleLayout::Channel, Some(Quantization::PerTensor)),
    ];
    for scheme in schemes {
        // A dense head, which is the embedding, and one in FP8.
        for tied in [true, false] {
            for dtype in [DType::BF16, DType::F16, DType::F32] {
                let changes = json!({ "head_dim": 128, "tie_word_embeddings": tied });
                let model = made_up::model("llama", &changes, scheme, dtype, &device);
                for batch in [1, 3, 8, 20] {
                    let what = format!("{scheme:?} {tied} {dtype:?} {batch}");
                    let head = !tied || (dtype != DType::F32 && batch <= 16);
                    let launched = head && scheme.1 != Some(Quantization::PerTensor);
                    check(&what, &model, batch, launched)?;
                }
            }
        }
    }
    Ok(())
}

/// Texts are the same by launches and by Candle's sampler, and end where they should.
#[test]
fn texts_are_those_of_the_logits() -> Result<()> {
    let Some(device) = devices::gpu() else {
        return Ok(());
    };
    let scheme = (ScaleLayout::Channel, Some(Quantization::PerToken));
    // Logits in F32, no two of which are equal: Candle's choice on a GPU may be any of equal ones.
    let changes = json!({ "head_dim": 128, "tie_word_embeddings": false });
    let model = made_up::model("llama", &changes, scheme, DType::F32, &device);
    let prompt = [5u32, 6, 7, 8];
    let mut config = GenerationConfig::new(model.config());
    config.sample_len = 12;
    config.eos_token_ids.clear();
    let text = |config: &GenerationConfig, max_seq: usize| {
        let mut generation =
            TextGeneration::new(&model, config.clone(), max_seq).expect("settings");
        let mut tokens = Vec::new();
        let generated = generation.generate(&prompt, |token| {
            tokens.push(token);
            std::ops::ControlFlow::Continue(())
        });
        (tokens, generated.map(|generated| generated.finish_reason))
    };
    let (tokens, _) = text(&config, 16);
    assert_eq!(tokens.len(), 12);
    // The penalty looks at no token, so that only the way is another one: logits, and Candle's sampler.
    let mut by_logits = config.clone();
    (by_logits.repeat_penalty, by_logits.repeat_last_n) = (1.5, 0);
    assert_eq!(text(&by_logits, 16).0, tokens);
    // It ends before an end-of-text token, or where the cache is full.
    let mut ends = config.clone();
    ends.eos_token_ids.insert(tokens[7]);
    let until = tokens
        .iter()
        .position(|token| *token == tokens[7])
        .expect("there");
    assert_eq!(text(&ends, 16).0, tokens[..until]);
    let (found, reason) = text(&config, 10);
    assert_eq!(found, tokens[..7]);
    assert!(matches!(reason, Err(Error::CacheFull { .. })), "{reason:?}");
    // All sequences of a batch are the same.
    for batch in [1, 3] {
        let mut generation = TextGeneration::new(&model, config.clone(), 16).expect("settings");
        let prompts = vec![&prompt[..]; batch];
        let texts = generation.generate_batch(&prompts).expect("texts");
        for text in &texts {
            assert_eq!(text.tokens.len(), 12);
            assert_eq!(text.tokens, texts[0].tokens);
        }
    }
    Ok(())
}
