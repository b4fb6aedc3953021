//! The generation loop: sampling, ends, timings, a cache that fills up.

use std::ops::ControlFlow;

use crate::common::{ids, model, prompt};
use candle_core::{D, DType, Tensor};
use candle_fp8_transformers::{CausalLm, Error, FinishReason, GenerationConfig, TextGeneration};
use serde_json::json;

fn llama() -> CausalLm {
    model("llama", json!({}), DType::F32).0
}

fn settings(sample_len: usize) -> GenerationConfig {
    GenerationConfig {
        sample_len,
        ..GenerationConfig::default()
    }
}

fn generate(model: &CausalLm, config: GenerationConfig, prompt: &[u32]) -> Vec<u32> {
    let mut generation = TextGeneration::new(model, config, 64).unwrap();
    generation
        .generate(prompt, |_| ControlFlow::Continue(()))
        .unwrap()
        .tokens
}

/// Greedy continuation without a cache: the whole text again for every token.
fn greedy(model: &CausalLm, prompt: &[u32], count: usize) -> Vec<u32> {
    let mut text = prompt.to_vec();
    for _ in 0..count {
        let mut cache = model.new_cache(1, text.len()).unwrap();
        let logits = model.forward(&ids(&[text.clone()]), &mut cache).unwrap();
        text.push(logits.argmax(D::Minus1).unwrap().to_vec1::<u32>().unwrap()[0]);
    }
    text.split_off(prompt.len())
}

#[test]
fn greedy_text_is_the_argmax_of_each_step() {
    let model = llama();
    let prompt = prompt(1, 5);
    let expected = greedy(&model, &prompt, 20);
    assert_eq!(generate(&model, settings(20), &prompt), expected);
    // A generator serves one prompt after the other; streams can be dropped half-way.
    let mut generation = TextGeneration::new(&model, settings(20), 64).unwrap();
    generation.stream(&[3, 4]).unwrap().next().unwrap().unwrap();
    let streamed: Result<Vec<u32>, _> = generation.stream(&prompt).unwrap().collect();
    assert_eq!(streamed.unwrap(), expected);
    // Equals of greedy: temperature 0, and sampling among the first alone.
    for (temperature, top_k) in [(Some(0.0), None), (Some(0.9), Some(1))] {
        let config = GenerationConfig {
            temperature,
            top_k,
            ..settings(20)
        };
        assert_eq!(generate(&model, config, &prompt), expected);
    }
}

#[test]
fn counts_times_and_reasons() {
    let model = llama();
    let prompt = prompt(1, 5);
    let text = greedy(&model, &prompt, 12);
    let run = |config: GenerationConfig, stop_after: usize| {
        let mut generation = TextGeneration::new(&model, config, 64).unwrap();
        let mut count = 0;
        let generated = generation.generate(&prompt, |_| {
            count += 1;
            if count == stop_after {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        });
        generated.unwrap()
    };
    let generated = run(settings(12), 100);
    assert_eq!(
        (generated.tokens.len(), generated.finish_reason),
        (12, FinishReason::Length)
    );
    assert_eq!(
        (
            generated.timings.prompt_tokens,
            generated.timings.generated_tokens
        ),
        (5, 11)
    );
    assert!(generated.timings.prompt_tokens_per_second() > 0.0);
    assert!(generated.timings.generated_tokens_per_second() > 0.0);

    // The first token that did not occur before it ends the text, and is not part of it.
    let at = (1..12).find(|&i| !text[..i].contains(&text[i])).unwrap();
    let eos_token_ids = [60, text[at]].into();
    let generated = run(
        GenerationConfig {
            eos_token_ids,
            ..settings(12)
        },
        100,
    );
    assert_eq!(generated.tokens, text[..at]);
    assert_eq!(generated.finish_reason, FinishReason::Eos(text[at]));
    assert_eq!(generated.timings.generated_tokens, at);
    // Even as the very first token.
    let eos_token_ids = [text[0]].into();
    let generated = run(
        GenerationConfig {
            eos_token_ids,
            ..settings(12)
        },
        100,
    );
    assert_eq!(
        (generated.tokens.len(), generated.timings.generated_tokens),
        (0, 0)
    );
    assert_eq!(generated.timings.generated_tokens_per_second(), 0.0);

    let generated = run(settings(12), 3);
    assert_eq!(generated.tokens, text[..3]);
    assert_eq!(generated.finish_reason, FinishReason::Stopped);
    let generated = run(settings(0), 100);
    assert_eq!(
        (generated.tokens.len(), generated.finish_reason),
        (0, FinishReason::Length)
    );
}

#[test]
fn sampling_follows_the_seed() {
    let model = llama();
    let prompt = prompt(1, 5);
    let with = |seed, top_p, top_k| {
        let config = GenerationConfig {
            temperature: Some(1.5),
            top_p,
            top_k,
            seed,
            ..settings(20)
        };
        generate(&model, config, &prompt)
    };
    for (top_p, top_k) in [
        (None, None),
        (Some(0.9), None),
        (None, Some(7)),
        (Some(0.9), Some(7)),
    ] {
        assert_eq!(with(1, top_p, top_k), with(1, top_p, top_k));
        assert_ne!(with(1, top_p, top_k), with(2, top_p, top_k));
    }
}

#[test]
fn a_repeat_penalty_keeps_recent_tokens_away() {
    let model = llama();
    let prompt = prompt(1, 5);
    let with = |repeat_penalty, repeat_last_n| {
        let config = GenerationConfig {
            repeat_penalty,
            repeat_last_n,
            ..settings(30)
        };
        generate(&model, config, &prompt)
    };
    let repeats = |text: &[u32], window: usize| {
        let whole = [&prompt, text].concat();
        (prompt.len()..whole.len())
            .filter(|&i| whole[i.saturating_sub(window)..i].contains(&whole[i]))
            .count()
    };
    assert!(repeats(&with(1.0, 64), 64) > 0);
    // So large a penalty that every logit above zero falls behind those not seen.
    assert_eq!(repeats(&with(1e6, 64), 64), 0);
    let short = with(1e6, 4);
    assert_eq!(repeats(&short, 4), 0);
    assert!(repeats(&short, 64) > 0);
    assert_eq!(with(1e6, 0), with(1.0, 0));
}

#[test]
fn a_full_cache_ends_the_text_with_an_error() {
    let model = llama();
    let prompt = prompt(1, 5);
    let expected = greedy(&model, &prompt, 6);
    let mut generation = TextGeneration::new(&model, settings(20), 10).unwrap();
    // 5 positions of the prompt and 5 of generated tokens; the sixth token needs no position.
    let mut stream = generation.stream(&prompt).unwrap();
    let tokens: Vec<u32> = stream.by_ref().take(6).map(Result::unwrap).collect();
    assert_eq!(tokens, expected);
    let error = stream.next().unwrap().unwrap_err();
    assert!(
        matches!(
            error,
            Error::CacheFull {
                used: 10,
                new: 1,
                max_seq: 10
            }
        ),
        "{error}"
    );
    assert!(stream.next().is_none());
    assert_eq!(stream.finish_reason(), None);
    // A prompt that is too long fails before any token; then a shorter one is served.
    let long = crate::common::prompt(2, 11);
    assert!(matches!(
        generation.stream(&long).err().unwrap(),
        Error::CacheFull { new: 11, .. }
    ));
    assert!(matches!(
        generation.generate_batch(&[&long, &long]).unwrap_err(),
        Error::CacheFull { new: 11, .. }
    ));
    assert!(matches!(
        generation.stream(&[]).err().unwrap(),
        Error::Mismatch { .. }
    ));
    let again: Vec<u32> = generation
        .stream(&prompt)
        .unwrap()
        .take(6)
        .map(Result::unwrap)
        .collect();
    assert_eq!(again, expected);
}

#[test]
fn a_batch_generates_what_each_prompt_does_alone() {
    for model_type in ["llama", "qwen3_moe"] {
        let model = model(model_type, json!({}), DType::F32).0;
        let prompts = [prompt(1, 5), prompt(2, 5), prompt(3, 5)];
        let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
        let first = generate(&model, settings(12), prompts[0]);
        for temperature in [None, Some(0.8)] {
            let config = GenerationConfig {
                temperature,
                // Ends the first text early (if greedy), so that it is carried along.
                eos_token_ids: [first[2]].into(),
                ..settings(12)
            };
            let mut generation = TextGeneration::new(&model, config.clone(), 32).unwrap();
            let batch = generation.generate_batch(&prompts).unwrap();
            for (index, (generated, prompt)) in batch.iter().zip(&prompts).enumerate() {
                let config = GenerationConfig {
                    seed: config.seed + index as u64,
                    ..config.clone()
                };
                assert_eq!(
                    generated.tokens,
                    generate(&model, config, prompt),
                    "{model_type}"
                );
                assert_eq!(generated.timings.prompt_tokens, 15);
            }
        }
        let mut generation = TextGeneration::new(&model, settings(12), 32).unwrap();
        for bad in [&[][..], &[&[][..]], &[&[1, 2][..], &[1][..]]] {
            let error = generation.generate_batch(bad).unwrap_err();
            assert!(matches!(error, Error::Mismatch { .. }), "{error}");
        }
    }
}

/// Weights that are damaged where only a later token meets them.
#[test]
fn logits_that_stop_being_finite_end_the_text_with_an_error() {
    let (healthy, mut tensors) = model("llama", json!({}), DType::F32);
    let prompt = prompt(1, 5);
    let text = greedy(&healthy, &prompt, 8);
    let at = (1..8)
        .find(|&i| !text[..i].contains(&text[i]) && !prompt.contains(&text[i]))
        .unwrap();
    let name = "model.embed_tokens.weight";
    let mut rows = tensors[name].to_vec2::<f32>().unwrap();
    rows[text[at] as usize][0] = f32::NAN;
    let embeddings = Tensor::new(rows, tensors[name].device()).unwrap();
    tensors.insert(name.to_string(), embeddings);
    let broken = crate::common::build(healthy.config(), &tensors, DType::F32);
    // Greedy; the most probable token by a sampler; and sampled.
    for (repeat_last_n, repeat_penalty, temperature) in
        [(64, 1.0, None), (0, 2.0, None), (64, 1.0, Some(1e-3))]
    {
        let config = GenerationConfig {
            temperature,
            repeat_penalty,
            repeat_last_n,
            ..settings(8)
        };
        let mut generation = TextGeneration::new(&broken, config, 16).unwrap();
        let mut stream = generation.stream(&prompt).unwrap();
        let tokens: Vec<u32> = stream.by_ref().take(at + 1).map(Result::unwrap).collect();
        assert_eq!(tokens, text[..=at]);
        let positions = prompt.len() + at + 1;
        let after = |error: &Error| match error {
            Error::NonFiniteLogits { positions, .. } => *positions,
            other => panic!("{other}"),
        };
        let error = stream.next().unwrap().unwrap_err();
        assert_eq!(after(&error), positions);
        assert!(stream.next().is_none());
        let error = generation.generate_batch(&[&prompt]).unwrap_err();
        assert_eq!(after(&error), positions);
    }
}

/// A GPU would not come back from such a token, so it is told before.
#[test]
fn tokens_outside_the_vocabulary_are_refused() {
    let model = llama();
    let vocab = model.config().vocab_size as u32;
    let mut generation = TextGeneration::new(&model, settings(2), 16).unwrap();
    let refused = |error: Error| {
        let what = matches!(
            error,
            Error::Mismatch {
                what: "a token id",
                ..
            }
        );
        assert!(
            what && error.to_string().contains(&vocab.to_string()),
            "{error}"
        );
    };
    refused(generation.stream(&[1, vocab]).err().unwrap());
    refused(
        generation
            .generate_batch(&[&[1, 2], &[vocab, 3]])
            .unwrap_err(),
    );
    let text: Result<Vec<u32>, _> = generation.stream(&[1, vocab - 1]).unwrap().collect();
    assert_eq!(text.unwrap().len(), 2);
}

#[test]
fn damaged_weights_and_bad_settings_are_errors() {
    let (healthy, mut tensors) = model("llama", json!({}), DType::F32);
    let norm = &tensors["model.norm.weight"];
    let broken = (norm * f64::NAN).unwrap();
    tensors.insert("model.norm.weight".to_string(), broken);
    let broken = crate::common::build(healthy.config(), &tensors, DType::F32);
    let mut generation = TextGeneration::new(&broken, settings(5), 16).unwrap();
    let error = generation.stream(&[1, 2]).err().unwrap();
    assert!(
        matches!(error, Error::NonFiniteLogits { positions: 2, .. }),
        "{error}"
    );

    for (config, key) in [
        (
            GenerationConfig {
                temperature: Some(-1.0),
                ..settings(5)
            },
            "temperature",
        ),
        (
            GenerationConfig {
                temperature: Some(f64::NAN),
                ..settings(5)
            },
            "temperature",
        ),
        (
            GenerationConfig {
                top_p: Some(0.0),
                ..settings(5)
            },
            "top_p",
        ),
        (
            GenerationConfig {
                top_p: Some(1.5),
                ..settings(5)
            },
            "top_p",
        ),
        (
            GenerationConfig {
                top_k: Some(0),
                ..settings(5)
            },
            "top_k",
        ),
        (
            GenerationConfig {
                repeat_penalty: 0.0,
                ..settings(5)
            },
            "repeat_penalty",
        ),
    ] {
        let error = TextGeneration::new(&healthy, config, 16)
            .unwrap_err()
            .to_string();
        assert!(error.contains(&format!("`{key}`")), "{error}");
    }
}
