//! Load, save, load: every tensor byte for byte; and under `dequantize` a plain checkpoint.

// Each test binary uses its part of the shared module.
#[allow(dead_code, unreachable_pub)]
mod support;

use std::path::Path;

use candle_compressed_tensors::{
    Checkpoint, Error, LoadOptions, QuantizerCompressedTensors, SaveOptions, State, save,
};
use candle_core::{DType, Device, Tensor};
use candle_fp8_transformers::{CausalLm, ModelConfig};
use serde_json::Value;
use support::{Mode, fixture, loadable, logits, max_difference, model, raw_tensors, scratch};

fn save_to(dir: &Path, quantizer: &QuantizerCompressedTensors, state: &State) {
    save(quantizer, state, dir, &SaveOptions::default())
        .unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
}

#[test]
fn every_tensor_comes_back_byte_for_byte() {
    for fixture in loadable() {
        let original = raw_tensors(&support::dir(&fixture.name));
        for (dtype, short) in [(DType::F32, "f32"), (DType::BF16, "bf16")] {
            let quantizer = fixture.quantizer(Mode::AsCheckpoint);
            let config = ModelConfig::from_json(quantizer.checkpoint().config()).unwrap();
            let vb = quantizer.var_builder(dtype, &Device::Cpu).unwrap();
            let loaded = CausalLm::load(&config, &quantizer, vb).unwrap();
            let state = loaded.state();
            // What is not in the state is copied: the test would pass without a model, were this empty.
            let fp8 = quantizer.plan().modules().len();
            assert!(
                state.names().count() >= fp8.min(20),
                "{}: the state is too small",
                fixture.name
            );
            let dir = scratch(&format!("{}-{short}", fixture.name));
            save_to(&dir, &quantizer, &state);
            let saved = raw_tensors(&dir);
            assert_eq!(
                original.keys().collect::<Vec<_>>(),
                saved.keys().collect::<Vec<_>>(),
                "{}",
                fixture.name
            );
            for (name, tensor) in &original {
                assert!(
                    saved[name] == *tensor,
                    "{} {short}: {name} differs",
                    fixture.name
                );
            }
            let text = |dir: &Path| std::fs::read_to_string(dir.join("config.json")).unwrap();
            assert_eq!(
                text(&dir),
                text(&support::dir(&fixture.name)),
                "{}: config.json",
                fixture.name
            );
            // … and it is a checkpoint.
            let again = Checkpoint::open(&dir).unwrap();
            QuantizerCompressedTensors::new(&again, LoadOptions::default()).unwrap();
        }
    }
}

#[test]
fn a_change_to_the_state_is_saved() {
    let fixture = fixture("llama-channel-token");
    let quantizer = fixture.quantizer(Mode::AsCheckpoint);
    let mut state = model(quantizer.checkpoint(), &quantizer).state();
    let name = "model.norm.weight";
    state.tensor(
        name,
        &(state.get(name).unwrap().tensor().unwrap() * 2.).unwrap(),
    );
    let dir = scratch("changed-state");
    save_to(&dir, &quantizer, &state);
    let (before, after) = (
        raw_tensors(&support::dir("llama-channel-token")),
        raw_tensors(&dir),
    );
    let differ: Vec<_> = before
        .keys()
        .filter(|key| before[*key] != after[*key])
        .collect();
    assert_eq!(differ, [name]);
}

#[test]
fn a_view_is_saved_without_what_is_around_it() {
    let fixture = fixture("llama-channel-token");
    let quantizer = fixture.quantizer(Mode::AsCheckpoint);
    let mut state = model(quantizer.checkpoint(), &quantizer).state();
    let name = "model.layers.0.mlp.down_proj.weight";
    let weight = state.get(name).unwrap().tensor().unwrap();
    assert_eq!(weight.dtype(), DType::F8E4M3);
    let (out, inputs) = weight.dims2().unwrap();
    let padded = Tensor::zeros((out, inputs + 7), DType::F8E4M3, &Device::Cpu).unwrap();
    padded.slice_set(&weight, 1, 0).unwrap();
    state.tensor(name, &padded.narrow(1, 0, inputs).unwrap());
    let dir = scratch("view");
    save_to(&dir, &quantizer, &state);
    let original = raw_tensors(&support::dir("llama-channel-token"));
    assert!(raw_tensors(&dir) == original);
}

/// Unstack, split, quantize: each step back, for values that changed and still have codes.
#[test]
fn changed_experts_find_their_codes_again() {
    for fixture_name in ["qwen3-moe-channel", "qwen3-moe-block", "mixtral-channel"] {
        let quantizer = fixture(fixture_name).quantizer(Mode::AsCheckpoint);
        let mut state = model(quantizer.checkpoint(), &quantizer).state();
        let merged: Vec<String> = state
            .names()
            .filter(|name| name.ends_with("experts.gate_up_proj"))
            .map(str::to_string)
            .collect();
        assert!(!merged.is_empty());
        for name in &merged {
            state.tensor(
                name.as_str(),
                &state.get(name).unwrap().tensor().unwrap().neg().unwrap(),
            );
        }
        let dir = scratch(&format!("{fixture_name}-negated"));
        save_to(&dir, &quantizer, &state);
        let (before, after) = (raw_tensors(&support::dir(fixture_name)), raw_tensors(&dir));
        let mut negated = 0;
        for (name, tensor) in &before {
            let ends = [
                "gate_proj.weight",
                "up_proj.weight",
                "w1.weight",
                "w3.weight",
            ];
            if name.contains(".experts.") && ends.iter().any(|end| name.ends_with(end)) {
                let codes: Vec<u8> = tensor.bytes.iter().map(|code| code ^ 0x80).collect();
                assert!(after[name].bytes == codes, "{fixture_name}: {name}");
                negated += 1;
            } else {
                assert!(after[name] == *tensor, "{fixture_name}: {name} changed");
            }
        }
        assert!(negated >= 2 * merged.len(), "{fixture_name}: {negated}");
    }
}

#[test]
fn dequantized_models_are_saved_as_plain_ones() {
    for name in [
        "llama-channel-token",
        "llama-tensor-static",
        "llama-block-group",
        "llama-kv",
        "llama-text-config",
        "llama-compression-config",
        "qwen2-channel-token",
        "qwen3-moe-block",
        "qwen3-moe-block-fp8",
        "mixtral-channel",
    ] {
        let fixture = fixture(name);
        let quantizer = fixture.quantizer(Mode::Dequantized);
        let loaded = model(quantizer.checkpoint(), &quantizer);
        let dir = scratch(&format!("{name}-plain"));
        save_to(&dir, &quantizer, &loaded.state());
        for (name, tensor) in raw_tensors(&dir) {
            assert_eq!(tensor.dtype, safetensors::Dtype::BF16, "{name}");
            assert!(
                !name.ends_with("_scale") && !name.contains("_scale_inv"),
                "{name}"
            );
        }
        let plain = Checkpoint::open(&dir).unwrap();
        assert!(
            !plain.config().to_string().contains("config_groups"),
            "{name}: {}",
            plain.config()
        );
        assert_eq!(plain.config().get("quantization_config"), None::<&Value>);
        let plain_quantizer =
            QuantizerCompressedTensors::new(&plain, LoadOptions::default()).unwrap();
        assert!(!plain_quantizer.is_fp8() && plain_quantizer.is_trainable());
        let plain = model(&plain, &plain_quantizer);
        // Values under BF16 scales are BF16 already; under F32 scales, saving rounds them, by 2⁻⁸ at most.
        let rounding = match name {
            "qwen3-moe-block-fp8" => f64::powi(2., -8),
            _ => 0.,
        };
        let (had, has) = (loaded.state(), plain.state());
        assert_eq!(
            had.names().collect::<Vec<_>>(),
            has.names().collect::<Vec<_>>(),
            "{name}"
        );
        for tensor in had.names() {
            let values = |state: &State| {
                let tensor = state
                    .get(tensor)
                    .unwrap()
                    .tensor()
                    .unwrap()
                    .to_dtype(DType::F64)
                    .unwrap();
                tensor.flatten_all().unwrap().to_vec1::<f64>().unwrap()
            };
            for (had, has) in values(&had).into_iter().zip(values(&has)) {
                let difference = (had - has).abs();
                assert!(
                    difference <= rounding * had.abs(),
                    "{name}: {tensor} had {had}, has {has}"
                );
            }
        }
        let ids = fixture.reference().ids("input_ids");
        let expected = logits(&loaded, &ids);
        let found = logits(&plain, &ids);
        let largest = expected
            .iter()
            .flatten()
            .fold(0., |max: f64, value| max.max(value.abs()));
        // Dequantized weights are F32 and plain ones BF16: equal values, whose products are added in another order.
        let bound = match rounding {
            0. => 1e-4 * largest,
            _ => 1e-2 * largest,
        };
        let difference = max_difference(&expected, &found);
        assert!(
            difference <= bound,
            "{name}: the saved model computes something else: {difference} > {bound}"
        );
    }
}

#[test]
fn large_checkpoints_are_sharded_with_an_index() {
    let fixture = fixture("llama-channel-token");
    let quantizer = fixture.quantizer(Mode::AsCheckpoint);
    let state = model(quantizer.checkpoint(), &quantizer).state();
    let dir = scratch("sharded");
    let max_shard_bytes = quantizer.checkpoint().bytes() / 3;
    save(&quantizer, &state, &dir, &SaveOptions { max_shard_bytes }).unwrap();
    let saved = Checkpoint::open(&dir).unwrap();
    assert_eq!(
        raw_tensors(&dir),
        raw_tensors(&support::dir("llama-channel-token"))
    );
    let index: Value = serde_json::from_str(
        &std::fs::read_to_string(dir.join("model.safetensors.index.json")).unwrap(),
    )
    .unwrap();
    assert_eq!(index["metadata"]["total_size"], saved.bytes());
    let files: std::collections::BTreeSet<&str> = index["weight_map"]
        .as_object()
        .unwrap()
        .values()
        .filter_map(Value::as_str)
        .collect();
    assert!(files.len() >= 3, "{files:?}");
    for file in files {
        assert!(
            file.ends_with(&format!("-of-{:05}.safetensors", index_files(&dir))),
            "{file}"
        );
        // The header comes on top of the tensors' bytes.
        assert!(
            dir.join(file).metadata().unwrap().len() <= max_shard_bytes + 100_000,
            "{file}"
        );
    }
}

fn index_files(dir: &Path) -> usize {
    let is_shard = |entry: &std::fs::DirEntry| {
        entry
            .file_name()
            .to_string_lossy()
            .ends_with(".safetensors")
    };
    std::fs::read_dir(dir)
        .unwrap()
        .flatten()
        .filter(is_shard)
        .count()
}

#[test]
fn saving_refuses_what_would_lose_something() {
    let fixture = fixture("qwen3-moe-channel");
    let quantizer = fixture.quantizer(Mode::AsCheckpoint);
    let state = model(quantizer.checkpoint(), &quantizer).state();
    let refused = |state: &State, dir: &Path| {
        let error = save(&quantizer, state, dir, &SaveOptions::default()).unwrap_err();
        assert!(
            matches!(error, Error::Save { .. } | Error::Candle(_)),
            "{error:?}"
        );
        error.to_string()
    };
    let own = refused(&state, quantizer.checkpoint().dir());
    assert!(own.contains("loaded from this folder"), "{own}");
    let full = scratch("not-empty");
    std::fs::write(full.join("model-00001-of-00002.safetensors"), "").unwrap();
    assert!(refused(&state, &full).contains("choose an empty folder"));

    let dir = scratch("refused");
    let mut extra = state.clone();
    extra.tensor(
        "model.adapter.weight",
        &Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap(),
    );
    assert!(refused(&extra, &dir).contains("no such tensor"));

    let mut reshaped = state.clone();
    reshaped.tensor(
        "model.norm.weight",
        &Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap(),
    );
    assert!(refused(&reshaped, &dir).contains("shape"));

    // Merged experts that were trained have no codes under the stored scales.
    let mut trained = state.clone();
    let name = "model.layers.0.mlp.experts.down_proj";
    trained.tensor(
        name,
        &(state.get(name).unwrap().tensor().unwrap() * 1.01).unwrap(),
    );
    let text = refused(&trained, &dir);
    assert!(
        text.contains("no FP8 code under the stored scale"),
        "{text}"
    );
    assert!(
        std::fs::read_dir(&dir).unwrap().next().is_none(),
        "a refused save leaves files behind"
    );
}
