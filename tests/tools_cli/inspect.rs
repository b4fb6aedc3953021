//! `inspect` on every checkpoint there is, and on what is none.

use candle_compressed_tensors::{LoadOptions, QuantizerCompressedTensors};
use candle_core::{DType, Device};
use candle_fp8_transformers::{CausalLm, ModelConfig};
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::run::{run, succeed};
use crate::support::{Raw, changed, dir, fixtures, raw_tensors, scratch};

fn text(value: &Value) -> &str {
    value
        .as_str()
        .unwrap_or_else(|| panic!("{value} is no text"))
}

fn list(value: &Value) -> &[Value] {
    value
        .as_array()
        .unwrap_or_else(|| panic!("{value} is no list"))
}

fn is_scale(name: &str) -> bool {
    ["weight_scale", "weight_scale_inv", "input_scale"]
        .iter()
        .any(|scale| name.ends_with(&format!(".{scale}")))
}

#[test]
fn totals_are_those_of_the_files() {
    for fixture in fixtures() {
        let model = dir(&fixture.name).display().to_string();
        let said = run("inspect", &["--model", &model, "--json"]);
        let report = said.json();
        assert_eq!(
            said.success,
            fixture.refusal.is_none(),
            "{}: {said:?}",
            fixture.name
        );

        let tensors = raw_tensors(&dir(&fixture.name));
        let bytes = |tensors: &mut dyn Iterator<Item = &Raw>| -> usize {
            tensors.map(|tensor| tensor.bytes.len()).sum()
        };
        let (modules, totals) = (list(&report["modules"]), &report["totals"]);
        let listed: u64 = modules
            .iter()
            .filter_map(|module| module["bytes"].as_u64())
            .sum();
        let all = bytes(&mut tensors.values());
        assert_eq!(listed, all as u64, "{}", fixture.name);
        assert_eq!(totals["bytes"], all);

        let Some(refusal) = &fixture.refusal else {
            let is_fp8 = |tensor: &Raw| tensor.dtype == Dtype::F8_E4M3;
            let count = tensors.values().filter(|tensor| is_fp8(tensor)).count();
            assert_eq!(totals["fp8_modules"], count, "{}", fixture.name);
            let listed = modules.iter().filter(|module| module["kind"] != "dense");
            assert_eq!(listed.count(), count, "{}", fixture.name);
            let of_fp8 = |(name, tensor): &(&String, &Raw)| is_fp8(tensor) || is_scale(name);
            let fp8 = bytes(&mut tensors.iter().filter(of_fp8).map(|(_, tensor)| tensor));
            assert_eq!(totals["fp8_bytes"], fp8, "{}", fixture.name);
            assert_eq!(totals["dense_bytes"], all - fp8, "{}", fixture.name);
            let parameters: usize = tensors
                .iter()
                .filter(|(name, _)| !is_scale(name))
                .map(|(_, tensor)| tensor.shape.iter().product::<usize>())
                .sum();
            assert_eq!(totals["as_bf16_bytes"], 2 * parameters, "{}", fixture.name);
            assert!(list(&report["refused"]).is_empty());
            continue;
        };
        let refused = list(&report["refused"])
            .iter()
            .map(text)
            .collect::<Vec<_>>();
        assert!(
            refused
                .iter()
                .any(|line| refusal[..2].iter().all(|word| line.contains(word))),
            "{}: {refused:?}",
            fixture.name
        );
        let named = |module: &&Value| text(&module["module"]).starts_with(&refusal[0]);
        let module = modules.iter().find(named).expect("the refused module");
        assert_eq!(module["kind"], "refused", "{}", fixture.name);
        assert!(said.stderr.contains("would be refused"), "{said:?}");
    }
}

#[test]
fn bytes_when_loaded_are_those_of_the_loaded_model() {
    for name in [
        "llama-channel-token",
        "llama-tensor-static",
        "llama-block-group",
        "qwen2-channel-token",
        "qwen3-moe-channel",
        "mixtral-block",
    ] {
        for dequantize in [false, true] {
            let checkpoint = candle_compressed_tensors::Checkpoint::open(dir(name)).expect(name);
            let options = LoadOptions {
                dequantize,
                ..LoadOptions::default()
            };
            let quantizer = QuantizerCompressedTensors::new(&checkpoint, options).expect(name);
            let config = ModelConfig::from_json(checkpoint.config()).expect(name);
            let vb = quantizer
                .var_builder(DType::BF16, &Device::Cpu)
                .expect(name);
            let model = CausalLm::load(&config, &quantizer, vb).expect(name);

            let folder = dir(name).display().to_string();
            let mut args = vec!["--model", &folder, "--json"];
            args.extend(dequantize.then_some("--dequantize"));
            let totals = &succeed("inspect", &args).json()["totals"];
            assert_eq!(totals["loaded_bytes"], model.weight_bytes(), "{name}");
            if dequantize {
                assert_eq!(totals["loaded_bytes"], totals["as_bf16_bytes"], "{name}");
                assert_eq!(totals["merged_experts_bytes"], 0, "{name}");
            }
        }
    }
}

#[test]
fn the_table_shows_schemes_scales_and_merged_experts() {
    let table = |name: &str| {
        let model = dir(name).display().to_string();
        succeed("inspect", &["--model", &model]).stdout
    };
    let words = |text: &str, start: &str| -> Vec<String> {
        let line = text.lines().find(|line| line.starts_with(start));
        let line = line.unwrap_or_else(|| panic!("no {start} in {text}"));
        line.split_whitespace().map(str::to_string).collect()
    };
    let kv = table("llama-kv");
    let row = words(&kv, "model.layers.1.mlp.down_proj ");
    let expected = "group_0 tensor static tensor F8_E4M3 [64, 112] 7,172";
    assert_eq!(
        row[1..],
        expected.split(' ').map(str::to_string).collect::<Vec<_>>()
    );
    assert!(kv.contains("KV cache: FP8 tensor; 4 scales"), "{kv}");
    words(&kv, "  model.layers.0.self_attn.k_scale ");

    let moe = table("mixtral-block");
    let experts = "model.layers.0.block_sparse_moe.experts.{0..2}.w1 ";
    assert!(
        words(&moe, experts)
            .join(" ")
            .contains("block 128x128, dequantized"),
        "{moe}"
    );
    assert!(moe.contains("of which merged experts, in BF16"), "{moe}");
    assert!(
        moe.contains("Warnings:\n  merged experts are dequantized"),
        "{moe}"
    );
}

#[test]
fn every_problem_is_listed() {
    let changed = changed("llama-channel-token", "inspect-problems", |tensors, _| {
        tensors.remove("model.layers.0.mlp.up_proj.weight_scale");
        let scale = tensors.get_mut("model.layers.0.self_attn.q_proj.weight_scale");
        scale.expect("a scale").bytes.fill(0);
    });
    let model = changed.display().to_string();
    let said = run("inspect", &["--model", &model]);
    assert!(
        !said.success && said.stderr.contains("2 problems"),
        "{said:?}"
    );
    let refused = said.stdout.split("Refused:").nth(1).expect("refusals");
    assert!(refused.contains("up_proj.weight_scale"), "{refused}");
    assert!(
        refused.contains("q_proj.weight_scale: scale 0 at position 0"),
        "{refused}"
    );
    let kind = |name: &str| {
        let row = said.stdout.lines().find(|line| line.starts_with(name));
        row.expect(name).contains("refused")
    };
    assert!(kind("model.layers.0.mlp.up_proj ") && kind("model.layers.0.self_attn.q_proj "));
    assert!(!kind("model.layers.0.self_attn.k_proj ") && !kind("lm_head "));
    // One scale less to worry about when the weights are to be dense: the other problem stays.
    assert!(!run("inspect", &["--model", &model, "--dequantize"]).success);
}

#[test]
fn damaged_checkpoints_are_errors_and_never_panics() {
    let fixture = "llama-channel-token";
    let weights = std::fs::read(dir(fixture).join("model.safetensors")).expect("weights");
    let config = std::fs::read(dir(fixture).join("config.json")).expect("config");
    let with_quantization = |quantization: Value| {
        let mut config: Value = serde_json::from_slice(&config).expect("JSON");
        config["quantization_config"] = quantization;
        config.to_string().into_bytes()
    };
    let mut huge = (1u64 << 60).to_le_bytes().to_vec();
    huge.extend(b"{}");
    let absurd = |shape: Value| {
        let header =
            json!({"a.weight": {"dtype": "F8_E4M3", "shape": shape, "data_offsets": [0, 4]}});
        let header = header.to_string();
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.as_bytes());
        file.extend([0; 4]);
        file
    };
    let many = 1u64 << 40;
    let cases: Vec<(&str, Vec<u8>, Vec<u8>)> = vec![
        (
            "truncated",
            config.clone(),
            weights[..weights.len() / 2].to_vec(),
        ),
        ("headless", config.clone(), weights[..5].to_vec()),
        ("empty", config.clone(), Vec::new()),
        ("huge-header", config.clone(), huge),
        ("absurd-shape", config.clone(), absurd(json!([many, many]))),
        ("no-shape", config.clone(), absurd(json!([]))),
        ("vector", config.clone(), absurd(json!([4]))),
        ("no-rows", config.clone(), absurd(json!([0, 4]))),
        ("config-text", b"not JSON".to_vec(), weights.clone()),
        ("config-list", b"[]".to_vec(), weights.clone()),
        ("config-empty", b"{}".to_vec(), weights.clone()),
        (
            "quantization-number",
            with_quantization(json!(3)),
            weights.clone(),
        ),
        (
            "quantization-empty",
            with_quantization(json!({})),
            weights.clone(),
        ),
        (
            "quantization-null",
            with_quantization(Value::Null),
            weights.clone(),
        ),
        (
            "bad-regex",
            with_quantization(json!({
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"targets": ["re:("], "weights": {"num_bits": 8, "type": "float"}}},
            })),
            weights.clone(),
        ),
    ];
    for (case, config, weights) in cases {
        let folder = scratch(&format!("inspect-damaged-{case}"));
        std::fs::write(folder.join("config.json"), config).expect("config");
        std::fs::write(folder.join("model.safetensors"), weights).expect("weights");
        let model = folder.display().to_string();
        let said = run("inspect", &["--model", &model]);
        assert!(
            !said.success && said.stderr.starts_with("error: "),
            "{case}: {said:?}"
        );
        let report = run("inspect", &["--model", &model, "--json"]).json();
        assert!(!list(&report["refused"]).is_empty(), "{case}: {report}");
        assert_eq!(text(&report["checkpoint"]), model, "{case}");
    }
    run("inspect", &["--model", "no/such/folder"]).assert_refused(&["no/such/folder"]);
    let report = run("inspect", &["--model", "no/such/folder", "--json"]).json();
    assert!(text(&report["refused"][0]).contains("no such folder"));
}

#[test]
fn a_model_that_is_not_built_here_is_a_warning() {
    let folder = changed("llama-channel-token", "inspect-other-model", |_, config| {
        config["architectures"] = json!(["SomeOtherForCausalLM"]);
    });
    let model = folder.display().to_string();
    let report = succeed("inspect", &["--model", &model, "--json"]).json();
    assert_eq!(report["architecture"], Value::Null);
    assert!(
        text(&report["warnings"][0]).contains("SomeOtherForCausalLM"),
        "{report}"
    );
}
