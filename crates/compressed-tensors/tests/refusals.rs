//! What is refused, with which variant and which words.

use compressed_tensors::{ActivationStrategy, Error, QuantizationConfig, WeightStrategy};
use serde_json::{Value, json};

const MODULE: &str = "model.layers.7.mlp.up_proj";

fn read(config: &Value) -> Result<QuantizationConfig, Error> {
    QuantizationConfig::from_model_config(config).map(|found| found.expect("quantized"))
}

/// The only group, called `odd`, of a config that is otherwise FP8-dynamic.
fn with_group(change: impl FnOnce(&mut Value)) -> Value {
    let mut config = json!({ "quantization_config": {
        "quant_method": "compressed-tensors", "format": "float-quantized",
        "config_groups": { "odd": {
            "targets": ["Linear"],
            "weights": { "num_bits": 8, "type": "float", "strategy": "channel" },
            "input_activations": { "num_bits": 8, "type": "float", "strategy": "token", "dynamic": true },
        }},
    }});
    change(&mut config["quantization_config"]);
    config
}

/// `resolve` refuses with module, group and every word of `words`; other classes are left alone.
#[track_caller]
fn refused(words: &[&str], change: impl FnOnce(&mut Value)) {
    let quantization = read(&with_group(change)).expect("the config itself is valid");
    let error = quantization
        .resolve(MODULE, "Linear")
        .expect_err("not served");
    let text = error.to_string();
    assert!(
        matches!(&error, Error::Unsupported { module, group, .. } if module == MODULE && group == "odd")
    );
    for word in [MODULE, "odd"].iter().chain(words) {
        assert!(text.contains(word), "`{word}` is not in: {text}");
    }
    assert_eq!(
        quantization.resolve("model.embed_tokens", "Embedding"),
        Ok(None)
    );
}

fn group(config: &mut Value) -> &mut Value {
    &mut config["config_groups"]["odd"]
}

#[test]
fn numbers_which_are_not_fp8() {
    let weights = |weights: Value| move |config: &mut Value| group(config)["weights"] = weights;
    refused(
        &["INT8", "weights"],
        weights(json!({ "num_bits": 8, "type": "int", "strategy": "channel" })),
    );
    refused(
        &["INT4 group 128"],
        weights(json!({ "num_bits": 4, "group_size": 128 })),
    );
    refused(
        &["FP6"],
        weights(json!({ "num_bits": 6, "type": "float", "strategy": "channel" })),
    );
    refused(
        &["FP16"],
        weights(json!({ "num_bits": 16, "type": "float" })),
    );
    refused(
        &["NVFP4"],
        weights(
            json!({ "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16 }),
        ),
    );
    refused(
        &["MXFP4"],
        weights(json!({ "num_bits": 4, "type": "float", "group_size": 32 })),
    );
    refused(
        &["MXFP8"],
        weights(json!({ "type": "float", "group_size": 32, "scale_dtype": "torch.uint8" })),
    );
    refused(&["input_activations", "INT8"], |config| {
        group(config)["input_activations"] =
            json!({ "type": "int", "strategy": "token", "dynamic": true });
    });
}

#[test]
fn strategies_without_an_op() {
    let weights = |weights: Value| move |config: &mut Value| group(config)["weights"] = weights;
    refused(
        &["weights", "group 128"],
        weights(json!({ "type": "float", "group_size": 128 })),
    );
    refused(
        &["weights", "attn_head"],
        weights(json!({ "type": "float", "strategy": "attn_head" })),
    );
    refused(
        &["weights", "dynamic"],
        weights(json!({ "type": "float", "strategy": "tensor", "dynamic": true })),
    );
    let inputs =
        |inputs: Value| move |config: &mut Value| group(config)["input_activations"] = inputs;
    refused(
        &["static FP8 group 128"],
        inputs(json!({ "type": "float", "group_size": 128 })),
    );
    refused(
        &["static FP8 channel"],
        inputs(json!({ "type": "float", "strategy": "channel" })),
    );
    refused(
        &["attn_head"],
        inputs(json!({ "type": "float", "strategy": "attn_head" })),
    );
    refused(
        &["static FP8 block"],
        inputs(json!({ "type": "float", "strategy": "block", "block_structure": [128, 128] })),
    );
}

#[test]
fn zero_points_permutations_and_scale_dtypes() {
    refused(&["weights", "symmetric = false"], |config| {
        group(config)["weights"]["symmetric"] = json!(false)
    });
    refused(&["input_activations", "zero points"], |config| {
        group(config)["input_activations"]["symmetric"] = json!(false);
    });
    refused(&["actorder", "g_idx"], |config| {
        group(config)["weights"]["actorder"] = json!("group")
    });
    refused(&["scale", "uint8"], |config| {
        group(config)["weights"]["scale_dtype"] = json!("torch.uint8")
    });
    // GPTQ writes this order to FP8 configs as well; it leaves no trace in the tensors.
    let quantization = read(&with_group(|config| {
        group(config)["weights"]["actorder"] = json!("static");
        group(config)["weights"]["scale_dtype"] = json!("torch.bfloat16");
    }));
    let scheme = quantization
        .expect("reads")
        .resolve(MODULE, "Linear")
        .expect("served")
        .expect("targeted");
    assert_eq!(scheme.weight, WeightStrategy::Channel);
}

#[test]
fn outputs_inputs_alone_transforms_and_formats() {
    refused(&["outputs", "output_activations"], |config| {
        group(config)["output_activations"] = json!({ "type": "float" });
    });
    refused(&["inputs", "weights are not"], |config| {
        group(config)["weights"] = Value::Null
    });
    refused(&["transform_config"], |config| {
        config["transform_config"] =
            json!({ "config_groups": { "u": { "type": "hadamard", "apply": [] } } });
    });
    for format in [
        "pack-quantized",
        "marlin-24",
        "nvfp4-pack-quantized",
        "mxfp8-quantized",
        "sparse-24-bitmask",
        "zip",
    ] {
        refused(&["format", format], |config| {
            config["format"] = json!(format)
        });
        refused(&["format", format], |config| {
            group(config)["format"] = json!(format)
        });
    }
    for (format, own) in [
        ("mixed-precision", "float-quantized"),
        ("pack-quantized", "naive-quantized"),
    ] {
        let quantization = read(&with_group(|config| {
            config["format"] = json!(format);
            group(config)["format"] = json!(own);
        }));
        let scheme = quantization
            .expect("reads")
            .resolve(MODULE, "Linear")
            .expect("the group's format wins");
        assert_eq!(
            scheme.map(|scheme| scheme.activations),
            Some(ActivationStrategy::DynamicToken)
        );
    }
}

#[test]
fn empty_groups() {
    for groups in [json!({}), Value::Null] {
        let error =
            read(&with_group(|config| config["config_groups"] = groups)).expect_err("empty");
        assert!(
            matches!(&error, Error::EmptyConfigGroups { path } if path == "quantization_config.config_groups")
        );
        assert!(error.to_string().contains("at least one group"), "{error}");
    }
}

#[test]
fn methods() {
    let method = |config: Value| {
        read(&json!({ "quantization_config": config })).expect_err("no method of ours")
    };
    for name in ["gptq", "awq", "bitsandbytes", "fbgemm_fp8", "modelopt"] {
        let error = method(json!({ "quant_method": name }));
        assert!(matches!(&error, Error::UnsupportedMethod { method, .. } if method == name));
        assert!(error.to_string().contains("compressed-tensors"), "{error}");
    }
    assert!(matches!(method(json!({})), Error::MissingMethod { .. }));
    assert!(matches!(
        method(json!({ "quant_method": 8 })),
        Error::Malformed { .. }
    ));
    assert!(
        read(&with_group(
            |config| config["quant_method"] = json!("compressed_tensors")
        ))
        .is_ok()
    );
}

#[test]
fn malformed_configs() {
    let cases: [(&str, Value); 17] = [
        ("", json!([])),
        ("", json!("config")),
        ("quantization_config", json!({ "quantization_config": [] })),
        ("quantization_config", json!({ "quantization_config": 8 })),
        (
            "text_config.quantization_config",
            json!({ "text_config": { "quantization_config": "fp8" } }),
        ),
        (
            "compression_config.quantization_config",
            json!({ "compression_config": { "quantization_config": [] } }),
        ),
        (
            "quantization_config.config_groups",
            with_group(|config| config["config_groups"] = json!([])),
        ),
        (
            "quantization_config.config_groups.odd",
            with_group(|config| *group(config) = Value::Null),
        ),
        (
            "quantization_config.config_groups.odd",
            with_group(|config| *group(config) = json!("Linear")),
        ),
        (
            "quantization_config.config_groups.odd",
            with_group(|config| *group(config) = json!([1])),
        ),
        (
            "quantization_config.config_groups.odd.targets",
            with_group(|config| group(config)["targets"] = Value::Null),
        ),
        (
            "quantization_config.config_groups.odd.targets",
            with_group(|config| group(config)["targets"] = json!("Linear")),
        ),
        (
            "quantization_config.config_groups.odd.format",
            with_group(|config| group(config)["format"] = json!(1)),
        ),
        (
            "quantization_config.ignore",
            with_group(|config| config["ignore"] = json!("lm_head")),
        ),
        (
            "quantization_config.format",
            with_group(|config| config["format"] = json!({})),
        ),
        (
            "quantization_config.run_compressed",
            with_group(|config| config["run_compressed"] = json!("no")),
        ),
        (
            "quantization_config.kv_cache_scheme",
            with_group(|config| config["kv_cache_scheme"] = json!([])),
        ),
    ];
    for (expected, config) in cases {
        let error = QuantizationConfig::from_model_config(&config).expect_err(expected);
        assert!(
            matches!(&error, Error::Malformed { path, .. } if path == expected),
            "{expected}: {error:?}"
        );
    }
}

#[test]
fn schemes_forbid_unknown_keys() {
    let error =
        read(&with_group(|config| group(config)["rotate"] = json!(true))).expect_err("unknown key");
    assert!(matches!(&error, Error::UnknownKey { path, key, .. }
        if path == "quantization_config.config_groups.odd" && key == "rotate"));
    assert!(error.to_string().contains("input_activations"), "{error}");
    let error = read(&with_group(|config| {
        group(config)["format"] = json!("mixed-precision")
    }))
    .expect_err("no format");
    assert!(matches!(error, Error::InvalidArgs { .. }));
    let error = read(&with_group(|config| {
        group(config)["input_activations"]["actorder"] = json!("weight")
    }))
    .expect_err("no");
    assert!(matches!(error, Error::InvalidArgs { .. }));
}

#[test]
fn legacy_configs() {
    let legacy = |config: Value| {
        let mut config = json!({ "quantization_config": config });
        config["quantization_config"]["quant_method"] = json!("fp8");
        read(&config).expect_err("refused")
    };
    assert!(matches!(
        legacy(json!({ "activation_scheme": "sometimes" })),
        Error::UnknownValue { .. }
    ));
    assert!(matches!(
        legacy(json!({ "fmt": "e5m2" })),
        Error::UnknownValue { .. }
    ));
    assert!(matches!(
        legacy(json!({ "scale_fmt": "ue8m0" })),
        Error::UnknownValue { .. }
    ));
    assert!(matches!(
        legacy(json!({ "weight_block_size": [128] })),
        Error::Malformed { .. }
    ));
    assert!(matches!(
        legacy(json!({ "weight_block_size": [0, 128] })),
        Error::Malformed { .. }
    ));
    assert!(matches!(
        legacy(json!({ "ignored_layers": "lm_head" })),
        Error::Malformed { .. }
    ));
    assert!(matches!(
        legacy(json!({ "kv_cache_scheme": "dynamic" })),
        Error::UnknownValue { .. }
    ));
    assert!(matches!(
        legacy(json!({ "ignored_layers": ["re:("] })),
        Error::Pattern { .. }
    ));
    let error = legacy(json!({ "activation_scheme": "static", "weight_block_size": [128, 128] }));
    assert!(matches!(error, Error::InvalidArgs { .. }));
}

#[test]
fn long_values_are_shortened() {
    let long = "é".repeat(100_000);
    let error = read(&with_group(|config| {
        group(config)["weights"]["strategy"] = json!(long)
    }))
    .expect_err("unknown");
    assert!(error.to_string().len() < 1000);
    let error = read(&with_group(|config| {
        config["ignore"] = json!({ "a": long })
    }))
    .expect_err("malformed");
    assert!(error.to_string().len() < 1000);
}
