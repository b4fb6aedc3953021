//! A GPU without memory left: errors that say so, and models and caches as they were. A program of its own, as other
//! tests want memory meanwhile.
#![cfg(feature = "cuda")]

// It runs on a GPU only.
#[allow(dead_code)]
#[path = "ops/devices.rs"]
mod devices;
#[path = "gpu/made_up.rs"]
mod made_up;

use std::ops::ControlFlow;

use candle_core::{DType, Device, Result, Tensor};
use candle_fp8::{Quantization, ScaleLayout, memory_usage, release_freed_memory};
use candle_fp8_transformers::{CausalLm, Error, GenerationConfig, KvCache, TextGeneration};

fn model(device: &Device) -> CausalLm {
    let scheme = (ScaleLayout::Channel, Some(Quantization::PerToken));
    let [(model_type, changes), ..] = made_up::configs();
    made_up::model(model_type, &changes, scheme, DType::BF16, device)
}

fn free(device: &Device) -> Result<u64> {
    Ok(memory_usage(device)?.expect("a pool").free())
}

fn generate(generation: &mut TextGeneration<'_>, prompt: &[u32]) -> Vec<u32> {
    let generated = generation.generate(prompt, |_| ControlFlow::Continue(()));
    generated.expect("a text").tokens
}

/// One test: what fits depends on everything that runs.
#[test]
fn without_memory_there_is_an_error_and_everything_is_as_it_was() -> Result<()> {
    let Some(device) = devices::gpu() else {
        return Ok(());
    };
    a_cache_that_does_not_fit(&device)?;
    a_prompt_without_room_to_work_in(&device)
}

fn a_cache_that_does_not_fit(device: &Device) -> Result<()> {
    let model = model(device);
    let mut config = GenerationConfig::new(model.config());
    config.sample_len = 20;
    config.eos_token_ids.clear();
    let mut generation = TextGeneration::new(&model, config.clone(), 64).expect("a cache");
    let prompt = [1, 2, 3, 4];
    let expected = generate(&mut generation, &prompt);

    release_freed_memory(device)?;
    let before = free(device)?;
    // Layers that fit one by one, and not together.
    let position = model.config().kv_bytes_per_position(DType::BF16) as u64;
    let max_seq = (before / position * 5 / 4) as usize;
    let error = TextGeneration::new(&model, config, max_seq).expect_err("no memory");
    assert!(matches!(error, Error::OutOfMemory { .. }), "{error}");
    let text = error.to_string();
    println!("{text}");
    assert!(text.contains(&format!("1 × {max_seq} positions")), "{text}");
    assert!(
        text.contains("GiB are free; take a smaller max_seq"),
        "{text}"
    );
    release_freed_memory(device)?;
    // Others may use the device too.
    let after = free(device)?;
    assert!(
        after + (1 << 30) > before,
        "{before} bytes were free, now {after}"
    );
    assert_eq!(generate(&mut generation, &prompt), expected);
    Ok(())
}

/// Takes what a device has, but for `rest` bytes.
fn fill(device: &Device, rest: u64) -> Result<Vec<Tensor>> {
    let mut taken = Vec::new();
    for bytes in [1 << 30, 64 << 20, 4 << 20, 1 << 20] {
        while free(device)? > rest + bytes as u64 {
            match Tensor::zeros(bytes, DType::U8, device) {
                Ok(tensor) => taken.push(tensor),
                Err(error) if candle_fp8::is_out_of_memory(&error) => break,
                Err(error) => return Err(error),
            }
        }
    }
    Ok(taken)
}

fn a_prompt_without_room_to_work_in(device: &Device) -> Result<()> {
    const LEN: usize = 60_000;
    let model = model(device);
    let ids: Vec<u32> = (0..LEN as u32).map(|i| i * 7 % 300).collect();
    let ids = Tensor::from_vec(ids, (1, LEN), device)?;
    let start = ids.narrow(1, 0, 5)?.contiguous()?;
    let step = Tensor::new(&[[9u32]], device)?;
    let mut cache = model.new_cache(1, LEN + 16).expect("a cache");
    model.forward(&start, &mut cache).expect("a prompt");
    let after_a_step = |cache: &mut KvCache| -> Result<Vec<Vec<f32>>> {
        let logits = model.forward(&step, cache).expect("a step");
        cache.truncate(5);
        logits.to_vec2::<f32>()
    };
    let expected = after_a_step(&mut cache)?;

    // Less than the inner values of one layer's MLP take, 2 × 768 × 2 bytes a token.
    release_freed_memory(device)?;
    let taken = fill(device, 64 << 20)?;
    let error = model.forward(&ids, &mut cache).expect_err("no memory");
    assert!(matches!(error, Error::OutOfMemory { .. }), "{error}");
    println!("{error}");
    let text = error.to_string();
    assert!(
        text.contains("a forward pass of [1, 60000] token ids"),
        "{text}"
    );
    assert_eq!(cache.len(), 5);
    // What fits goes on, memory still short …
    for _ in 0..3 {
        assert_eq!(after_a_step(&mut cache)?, expected);
    }
    // … and the prompt does once there is room.
    drop(taken);
    model.forward(&ids, &mut cache).expect("a forward pass");
    assert_eq!(cache.len(), LEN + 5);
    cache.truncate(5);
    assert_eq!(after_a_step(&mut cache)?, expected);
    Ok(())
}
