//! A model of random weights as a checkpoint, to load as any other.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use candle_fp8_examples::{STORIES_LLAMA, cli, units};
use candle_fp8_transformers::CausalLm;
use serde_json::{Value, json};

use super::random::{LmHead, RandomWeights};
use super::shape::Shape;

/// Writes the first `layers` layers of a shape into the folder `dir`, which is made.
pub(crate) fn save(shape: Shape, layers: usize, lm_head: LmHead, dir: &Path) -> Result<()> {
    let start = Instant::now();
    let config = shape.config(layers)?;
    ensure!(
        config.moe.is_none(),
        "--save: {} has experts, which are made merged and dense here, and stored one by one in FP8",
        shape.name()
    );
    let weights_file = dir.join("model.safetensors");
    ensure!(
        !weights_file.exists(),
        "--save: {} is there already; choose another folder",
        weights_file.display()
    );
    std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;

    cli::note(format_args!("{}: random weights", shape.name()));
    let weights = RandomWeights::new(|_| ()).with_lm_head(lm_head);
    let vb = weights.var_builder(DType::BF16, &Device::Cpu);
    let state = CausalLm::load(&config, &weights, vb)?.state();
    let mut tensors: BTreeMap<&str, Tensor> = BTreeMap::new();
    for name in state.names() {
        if let Some(tensor) = state.get(name) {
            tensors.insert(name, tensor.tensor()?);
        }
    }
    cli::note(format_args!("writing {}", weights_file.display()));
    // transformers refuses files without this line.
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    safetensors::serialize_to_file(&tensors, Some(metadata), &weights_file)
        .with_context(|| format!("cannot write {}", weights_file.display()))?;

    let config_file = dir.join("config.json");
    let text = serde_json::to_string_pretty(&config_json(shape, layers, lm_head))?;
    std::fs::write(&config_file, text + "\n")
        .with_context(|| format!("cannot write {}", config_file.display()))?;
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
        let from = root
            .join("tests/checkpoints")
            .join(STORIES_LLAMA)
            .join(name);
        std::fs::copy(&from, dir.join(name))
            .with_context(|| format!("cannot copy {}", from.display()))?;
    }
    let bytes = std::fs::metadata(&weights_file)?.len();
    cli::note(format_args!(
        "{}: {} in {:.1} s",
        dir.display(),
        units::bytes(bytes),
        start.elapsed().as_secs_f64()
    ));
    Ok(())
}

/// That of the shape, quantized as llm-compressor's `FP8_DYNAMIC` does it.
fn config_json(shape: Shape, layers: usize, lm_head: LmHead) -> Value {
    let mut config = shape.json();
    config["num_hidden_layers"] = layers.into();
    config["model_type"] = "llama".into();
    config["hidden_act"] = "silu".into();
    config["dtype"] = "bfloat16".into();
    // The last token of the vocabulary, which the tokenizer does not have.
    config["eos_token_id"] = json!(config["vocab_size"].as_u64().map(|size| size - 1));
    let ignore: &[&str] = match lm_head {
        LmHead::Bf16 => &["lm_head"],
        LmHead::Fp8 => &[],
    };
    config["quantization_config"] = json!({
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": ignore,
        "kv_cache_scheme": null,
        "config_groups": { "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 8, "type": "float", "strategy": "channel", "symmetric": true, "dynamic": false,
            },
            "input_activations": {
                "num_bits": 8, "type": "float", "strategy": "token", "symmetric": true, "dynamic": true,
            },
        } },
    });
    config
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_compressed_tensors::{Checkpoint, LoadOptions, QuantizerCompressedTensors};
    use candle_fp8_transformers::ModelConfig;

    #[test]
    fn what_was_written_is_a_checkpoint_of_the_same_weights() {
        let dir = std::env::temp_dir().join(format!("candle-fp8-bench-{}", std::process::id()));
        for lm_head in [LmHead::Bf16, LmHead::Fp8] {
            save(Shape::Llama1b, 1, lm_head, &dir).unwrap();
            let checkpoint = Checkpoint::open(&dir).unwrap();
            let quantizer =
                QuantizerCompressedTensors::new(&checkpoint, LoadOptions::default()).unwrap();
            let config = ModelConfig::from_json(checkpoint.config()).unwrap();
            let vb = quantizer.var_builder(DType::BF16, &Device::Cpu).unwrap();
            let found = CausalLm::load(&config, &quantizer, vb).unwrap();
            let weights = RandomWeights::new(|_| ()).with_lm_head(lm_head);
            let vb = weights.var_builder(DType::BF16, &Device::Cpu);
            let made = CausalLm::load(&Shape::Llama1b.config(1).unwrap(), &weights, vb).unwrap();
            assert!(found.linears().all(|(name, linear)| {
                linear.is_fp8() || (name == "lm_head" && lm_head == LmHead::Bf16)
            }));
            let ids = Tensor::new(&[[5u32, 31999, 7]], &Device::Cpu).unwrap();
            let logits = |model: &CausalLm| {
                let mut cache = model.new_cache(1, 3).unwrap();
                let logits = model.forward(&ids, &mut cache).unwrap();
                logits.to_vec2::<f32>().unwrap()
            };
            assert_eq!(logits(&found), logits(&made));
            save(Shape::Llama1b, 1, lm_head, &dir).unwrap_err();
            drop(checkpoint);
            std::fs::remove_dir_all(&dir).unwrap();
        }
        save(Shape::Qwen3Moe30b, 1, LmHead::Bf16, &dir).unwrap_err();
        assert!(!dir.exists());
    }
}
