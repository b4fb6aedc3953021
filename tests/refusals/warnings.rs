//! What is strange but loads: told, not refused.

use std::path::Path;

use candle_compressed_tensors::{LoadOptions, QuantizerCompressedTensors, Warning};
use serde_json::json;

use crate::{
    load,
    support::{Mode, changed, dir, fixture, model},
};

fn loads(dir: &Path, options: LoadOptions) -> QuantizerCompressedTensors {
    load(dir, options).unwrap_or_else(|error| panic!("{}: {error}", dir.display()))
}

#[test]
fn a_plain_checkpoint_warns_of_nothing() {
    for name in ["llama-channel-token", "llama-tensor-static", "llama-kv"] {
        for mode in Mode::ALL {
            assert_eq!(loads(&dir(name), mode.options()).warnings(), []);
        }
    }
}

#[test]
fn targets_that_match_nothing() {
    let dir = changed("llama-channel-token", "refusals-targets", |_, config| {
        config["quantization_config"]["config_groups"]["group_0"]["targets"] = json!([
            "Linear",
            "re:.*vision.*",
            "model.layers.7.mlp.up_proj",
            "Conv2d"
        ]);
    });
    let quantizer = loads(&dir, LoadOptions::default());
    let targets = ["re:.*vision.*", "model.layers.7.mlp.up_proj", "Conv2d"].map(String::from);
    assert_eq!(
        quantizer.warnings(),
        [Warning::UnmatchedTargets {
            targets: targets.to_vec()
        }]
    );
    assert_eq!(
        quantizer.warnings()[0].to_string(),
        "quantization targets that match no module of the checkpoint: re:.*vision.*, model.layers.7.mlp.up_proj, Conv2d"
    );
    assert_eq!(quantizer.plan().modules().len(), 14);
}

#[test]
fn modules_to_not_convert_that_match_nothing() {
    let options = LoadOptions {
        modules_to_not_convert: vec!["mlp.down_proj".into(), "visual".into(), "up".into()],
        ..LoadOptions::default()
    };
    let quantizer = loads(&dir("llama-channel-token"), options);
    assert_eq!(
        quantizer.warnings(),
        [Warning::UnmatchedModules {
            modules: vec!["visual".into(), "up".into()]
        }]
    );
    assert_eq!(
        quantizer.warnings()[0].to_string(),
        "modules_to_not_convert that match no module of the checkpoint: visual, up"
    );
    let modules = quantizer.plan().modules();
    for (name, module) in modules {
        assert_eq!(
            module.dequantized,
            name.ends_with("mlp.down_proj"),
            "{name}"
        );
    }
}

#[test]
fn run_compressed_is_taken_as_dequantize() {
    for value in [true, false] {
        let name = format!("refusals-run-compressed-{value}");
        let dir = changed("llama-channel-token", &name, |_, config| {
            config["quantization_config"]["run_compressed"] = json!(value);
        });
        for dequantize in [true, false] {
            let options = LoadOptions {
                dequantize,
                ..LoadOptions::default()
            };
            let quantizer = loads(&dir, options);
            assert_eq!(quantizer.warnings(), [Warning::RunCompressed { value }]);
            assert_eq!(
                quantizer.warnings()[0].to_string(),
                format!(
                    "config.json says `run_compressed: {value}`, a deprecated option: taken as `dequantize: {}`",
                    !value
                )
            );
            // Either of them asks for dequantized weights.
            let fp8 = value && !dequantize;
            assert!(quantizer.is_fp8());
            assert_eq!(quantizer.use_fp8_kernel(), fp8);
            assert_eq!(quantizer.is_trainable(), !fp8);
            let model = model(quantizer.checkpoint(), &quantizer);
            assert_eq!(model.linears().any(|(_, linear)| linear.is_fp8()), fp8);
        }
    }
}

#[test]
fn merged_experts_say_what_they_cost() {
    let moe = fixture("qwen3-moe-channel");
    let quantizer = moe.quantizer(Mode::AsCheckpoint);
    // 4 experts of 3 × 48 × 64.
    let fp8_bytes = 4 * 3 * 48 * 64;
    assert_eq!(
        quantizer.warnings(),
        [Warning::ExpertsDequantized {
            fp8_bytes,
            dense_bytes: 2 * fp8_bytes
        }]
    );
    let megabytes = Warning::ExpertsDequantized {
        fp8_bytes: 3 << 20,
        dense_bytes: 6 << 20,
    };
    assert_eq!(
        megabytes.to_string(),
        "merged experts are dequantized: 3.0 MiB of FP8 weights take 6.0 MiB in BF16, twice that in F32"
    );
    assert_eq!(moe.quantizer(Mode::Dequantized).warnings(), []);
}
