//! Every published variant of FP8 checkpoints, as its config.json says it: one test for each.

use compressed_tensors::{
    ActivationStrategy as A, Error, Fp8Scheme, KvCacheStrategy, QuantMethod, QuantizationConfig,
    WeightStrategy as W,
};
use serde_json::{Value, json};

const DOWN: &str = "model.layers.0.mlp.down_proj";

/// Args with every null that writers put there.
fn args(strategy: &str, dynamic: bool) -> Value {
    json!({
        "num_bits": 8, "type": "float", "symmetric": true, "group_size": null, "strategy": strategy,
        "block_structure": null, "dynamic": dynamic, "actorder": null, "scale_dtype": null, "zp_dtype": null,
        "observer": null, "observer_kwargs": {},
    })
}

fn block(structure: Value) -> Value {
    let mut weights = args("block", false);
    weights["block_structure"] = structure;
    weights
}

fn group(size: i64) -> Value {
    let mut inputs = args("group", true);
    inputs["group_size"] = json!(size);
    inputs
}

fn scheme(weights: Value, inputs: Value) -> Value {
    json!({
        "targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": null,
        "format": null,
    })
}

/// A whole quantization config with one group.
fn config(weights: Value, inputs: Value) -> Value {
    json!({
        "config_groups": { "group_0": scheme(weights, inputs) },
        "quant_method": "compressed-tensors", "kv_cache_scheme": null, "format": "float-quantized",
        "quantization_status": "compressed", "global_compression_ratio": null, "ignore": ["lm_head"],
        "version": "0.12.2", "sparsity_config": {}, "transform_config": {},
    })
}

fn read(config: &Value) -> QuantizationConfig {
    QuantizationConfig::from_model_config(config)
        .expect("the config reads")
        .expect("the model is quantized")
}

fn quantized(config: Value) -> QuantizationConfig {
    read(&json!({ "model_type": "llama", "quantization_config": config }))
}

fn resolved(quantization: &QuantizationConfig, module: &str) -> Fp8Scheme {
    quantization
        .resolve(module, "Linear")
        .expect("served")
        .expect("targeted")
}

#[track_caller]
fn expect(weights: Value, inputs: Value, weight: W, activations: A) {
    let quantization = quantized(config(weights, inputs));
    assert_eq!(
        resolved(&quantization, DOWN),
        Fp8Scheme {
            group: "group_0".to_string(),
            weight,
            activations,
            scale_name: "weight_scale"
        }
    );
    assert_eq!(quantization.resolve("lm_head", "Linear"), Ok(None));
}

#[test]
fn rows_1_to_7_strategies() {
    expect(
        args("channel", false),
        args("token", true),
        W::Channel,
        A::DynamicToken,
    );
    expect(
        args("tensor", false),
        args("tensor", false),
        W::Tensor,
        A::StaticTensor,
    );
    expect(
        args("channel", false),
        args("tensor", false),
        W::Channel,
        A::StaticTensor,
    );
    expect(
        args("tensor", false),
        args("token", true),
        W::Tensor,
        A::DynamicToken,
    );
    expect(
        args("tensor", false),
        args("tensor", true),
        W::Tensor,
        A::DynamicTensor,
    );
    let blocks = W::Block {
        rows: 128,
        cols: 128,
    };
    expect(
        block(json!([128, 128])),
        group(128),
        blocks,
        A::DynamicGroup(128),
    );
    expect(
        block(json!("128x128")),
        args("token", true),
        blocks,
        A::DynamicToken,
    );
    expect(
        block(json!([128, 128])),
        args("tensor", true),
        blocks,
        A::DynamicTensor,
    );
    expect(
        block(json!([64, 32])),
        Value::Null,
        W::Block { rows: 64, cols: 32 },
        A::None,
    );
    expect(args("tensor", false), Value::Null, W::Tensor, A::None);
    expect(args("channel", false), Value::Null, W::Channel, A::None);
}

#[test]
fn weight_only_is_stored_as_naive_quantized() {
    let mut config = config(args("channel", false), Value::Null);
    config["format"] = json!("naive-quantized");
    assert_eq!(resolved(&quantized(config), DOWN).activations, A::None);
}

#[test]
fn row_8_kv_cache_scheme() {
    let mut config = config(args("channel", false), args("token", true));
    assert_eq!(quantized(config.clone()).resolve_kv_cache(), Ok(None));
    config["kv_cache_scheme"] = args("tensor", false);
    let quantization = quantized(config.clone());
    assert!(quantization.kv_cache().is_some());
    assert_eq!(
        quantization.resolve_kv_cache(),
        Ok(Some(KvCacheStrategy::Tensor))
    );
    config["kv_cache_scheme"] = args("attn_head", false);
    assert_eq!(
        quantized(config.clone()).resolve_kv_cache(),
        Ok(Some(KvCacheStrategy::AttnHead))
    );
    // The cache alone may be quantized.
    config["config_groups"] = json!({});
    let quantization = quantized(config.clone());
    assert_eq!(quantization.resolve(DOWN, "Linear"), Ok(None));
    assert!(quantization.kv_cache().is_some());

    for wrong in [
        args("tensor", true),
        args("channel", false),
        json!({ "num_bits": 8, "type": "int" }),
    ] {
        config["kv_cache_scheme"] = wrong;
        let error = quantized(config.clone())
            .resolve_kv_cache()
            .expect_err("not served");
        assert!(matches!(error, Error::UnsupportedKvCache { .. }));
        assert!(error.to_string().contains("kv_cache_scheme"), "{error}");
    }
}

#[test]
fn row_9_two_fp8_groups() {
    let mut config = config(args("channel", false), args("token", true));
    config["config_groups"]["group_1"] = scheme(block(json!([128, 128])), group(128));
    config["config_groups"]["group_1"]["targets"] = json!(["re:.*mlp\\.(gate|up|down)_proj$"]);
    let quantization = quantized(config);
    assert_eq!(resolved(&quantization, DOWN).group, "group_1");
    assert_eq!(
        resolved(&quantization, DOWN).weight,
        W::Block {
            rows: 128,
            cols: 128
        }
    );
    let q_proj = resolved(&quantization, "model.layers.0.self_attn.q_proj");
    assert_eq!(
        (q_proj.group.as_str(), q_proj.weight),
        ("group_0", W::Channel)
    );
    let names: Vec<_> = quantization
        .groups()
        .iter()
        .map(|scheme| scheme.group.as_str())
        .collect();
    assert_eq!(names, ["group_0", "group_1"]);
}

#[test]
fn row_10_fp8_beside_nvfp4_and_int4() {
    let nvfp4 = json!({
        "num_bits": 4, "type": "float", "symmetric": true, "group_size": 16, "strategy": "tensor_group",
        "dynamic": false, "scale_dtype": "torch.float8_e4m3fn", "observer_kwargs": {},
    });
    let int4 = json!({ "num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": true });
    for (weights, format, name) in [
        (nvfp4, "nvfp4-pack-quantized", "NVFP4"),
        (int4, "pack-quantized", "INT4"),
    ] {
        let mut config = config(args("channel", false), args("token", true));
        config["format"] = json!("mixed-precision");
        config["config_groups"]["group_0"]["format"] = json!("float-quantized");
        config["config_groups"]["group_1"] = json!({
            "targets": ["re:.*down_proj"], "weights": weights, "format": format,
        });
        let quantization = quantized(config);
        assert_eq!(
            resolved(&quantization, "model.layers.0.mlp.up_proj").weight,
            W::Channel
        );
        assert_eq!(quantization.resolve("lm_head", "Linear"), Ok(None));
        let error = quantization
            .resolve(DOWN, "Linear")
            .expect_err("not served");
        assert!(
            matches!(&error, Error::Unsupported { module, group, reason }
                if module == DOWN && group == "group_1" && reason.contains(name)),
            "{error}"
        );
        for part in [DOWN, "group_1", name] {
            assert!(error.to_string().contains(part), "{error}");
        }
    }
}

#[test]
fn row_11_status_decides_nothing() {
    for status in [
        json!("frozen"),
        json!("compressed"),
        json!("initialized"),
        Value::Null,
    ] {
        let mut config = config(args("channel", false), args("token", true));
        config["quantization_status"] = status.clone();
        let quantization = quantized(config);
        assert_eq!(quantization.status(), status.as_str());
        assert_eq!(resolved(&quantization, DOWN).weight, W::Channel);
    }
}

#[test]
fn row_12_compression_config() {
    let inner = config(args("tensor", false), args("tensor", false));
    let flat = json!({ "compression_config": inner.clone() });
    let nested = json!({
        "compression_config": {
            "quantization_config": inner.clone(),
            "sparsity_config": { "format": "dense", "global_sparsity": 0.12, "sparsity_structure": "unstructured" },
            "run_compressed": false,
        }
    });
    for config in [&flat, &nested] {
        assert_eq!(resolved(&read(config), DOWN).activations, A::StaticTensor);
        assert_eq!(read(config).raw(), &config["compression_config"]);
    }
    assert_eq!(read(&flat).run_compressed(), None);
    assert_eq!(read(&nested).run_compressed(), Some(false));

    // Sparsity that is only reported, without quantization.
    let sparse = json!({ "compression_config": { "sparsity_config": { "format": "dense", "global_sparsity": 0.1 } } });
    assert!(
        QuantizationConfig::from_model_config(&sparse)
            .expect("reads")
            .is_none()
    );
    // The newer key wins; null counts as absent.
    let both = json!({ "quantization_config": null, "compression_config": inner });
    assert_eq!(read(&both).format(), Some("float-quantized"));
}

#[test]
fn row_14_quantized_lm_head() {
    let mut config = config(args("channel", false), args("token", true));
    config["ignore"] = json!([]);
    assert_eq!(
        resolved(&quantized(config.clone()), "lm_head").weight,
        W::Channel
    );
    config["ignore"] = Value::Null;
    assert_eq!(resolved(&quantized(config), "lm_head").weight, W::Channel);
}

#[test]
fn row_15_text_config_and_prefixes() {
    let mut inner = config(args("channel", false), args("token", true));
    inner["ignore"] = json!([
        "re:.*lm_head",
        "re:vision_tower.*",
        "re:multi_modal_projector.*"
    ]);
    let quantization =
        read(&json!({ "model_type": "llava", "text_config": { "quantization_config": inner } }));
    assert_eq!(
        resolved(&quantization, "language_model.model.layers.0.mlp.down_proj").weight,
        W::Channel
    );
    for module in [
        "vision_tower.layers.0.fc1",
        "language_model.lm_head",
        "multi_modal_projector.linear_1",
    ] {
        assert!(quantization.is_ignored(module, "Linear"), "{module}");
        assert_eq!(quantization.resolve(module, "Linear"), Ok(None));
    }
}

#[test]
fn row_16_experts_have_names_of_their_own() {
    let mut config = config(block(json!([128, 128])), group(128));
    config["ignore"] = json!(["lm_head", "re:.*mlp\\.gate$"]);
    let quantization = quantized(config);
    assert_eq!(
        resolved(&quantization, "model.layers.3.mlp.experts.17.gate_proj").activations,
        A::DynamicGroup(128)
    );
    assert_eq!(
        quantization.resolve("model.layers.3.mlp.gate", "Linear"),
        Ok(None)
    );
}

#[test]
fn row_17_mxfp8_is_refused() {
    let mut weights = group(32);
    weights["dynamic"] = json!(false);
    weights["scale_dtype"] = json!("torch.uint8");
    let mut inputs = group(32);
    inputs["scale_dtype"] = json!("torch.uint8");
    let mut config = config(weights, inputs);
    config["format"] = json!("mxfp8-quantized");
    let error = quantized(config)
        .resolve(DOWN, "Linear")
        .expect_err("not served")
        .to_string();
    for part in [DOWN, "group_0", "MXFP8"] {
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn row_18_sparse_weights_are_refused() {
    for sparsity in [
        json!({ "format": "sparse-24-bitmask", "sparsity_structure": "2:4", "targets": ["Linear"], "ignore": ["lm_head"] }),
        json!({ "format": "sparse-bitmask", "sparsity_structure": "unstructured" }),
        json!({ "format": "dense", "sparsity_structure": "2:4", "targets": ["re:.*down_proj"], "ignore": [] }),
    ] {
        let mut config = config(args("channel", false), args("token", true));
        config["sparsity_config"] = sparsity;
        let quantization = quantized(config);
        let error = quantization
            .resolve(DOWN, "Linear")
            .expect_err("not served")
            .to_string();
        for part in [DOWN, "group_0", "sparse"] {
            assert!(error.contains(part), "{error}");
        }
        assert_eq!(quantization.resolve("lm_head", "Linear"), Ok(None));
    }
    for dense in [
        json!({ "format": "dense" }),
        json!({ "sparsity_structure": "0:0" }),
        json!({}),
        Value::Null,
    ] {
        let mut config = config(args("channel", false), args("token", true));
        config["sparsity_config"] = dense;
        assert_eq!(resolved(&quantized(config), DOWN).weight, W::Channel);
    }
    // Sparse and not quantized at all.
    let sparse = json!({ "quantization_config": {
        "quant_method": "compressed-tensors", "config_groups": {},
        "sparsity_config": { "format": "sparse-24-bitmask", "sparsity_structure": "2:4", "targets": ["Linear"] },
    }});
    assert!(matches!(
        read(&sparse).resolve(DOWN, "Linear"),
        Err(Error::Unsupported { .. })
    ));
}

#[test]
fn row_23_auto_fp8() {
    let dynamic = json!({ "quant_method": "fp8", "activation_scheme": "dynamic", "ignored_layers": ["lm_head"] });
    let quantization = quantized(dynamic);
    assert_eq!(quantization.quant_method(), QuantMethod::Fp8);
    assert_eq!(quantization.ignore(), ["lm_head"]);
    assert_eq!(
        resolved(&quantization, DOWN),
        Fp8Scheme {
            group: "fp8".to_string(),
            weight: W::Tensor,
            activations: A::DynamicToken,
            scale_name: "weight_scale",
        }
    );
    assert_eq!(quantization.resolve("lm_head", "Linear"), Ok(None));
    assert_eq!(quantization.resolve("model.norm", "RMSNorm"), Ok(None));

    let fixed = json!({ "quant_method": "fp8", "activation_scheme": "static", "kv_cache_scheme": "static" });
    let quantization = quantized(fixed);
    assert_eq!(
        resolved(&quantization, "lm_head").activations,
        A::StaticTensor
    );
    assert_eq!(
        quantization.resolve_kv_cache(),
        Ok(Some(KvCacheStrategy::Tensor))
    );
}

#[test]
fn row_23_block_fp8() {
    let quantization = quantized(json!({
        "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 64],
        "modules_to_not_convert": ["lm_head", "model.layers.1", "mlp.gate", "visual"],
    }));
    assert_eq!(
        resolved(&quantization, DOWN),
        Fp8Scheme {
            group: "fp8".to_string(),
            weight: W::Block {
                rows: 128,
                cols: 64
            },
            activations: A::DynamicGroup(64),
            scale_name: "weight_scale_inv",
        }
    );
    let skipped = [
        "lm_head",
        "model.layers.1.mlp.up_proj",
        "model.layers.0.mlp.gate",
        "model.visual.blocks.0.qkv",
    ];
    for module in skipped {
        assert_eq!(quantization.resolve(module, "Linear"), Ok(None), "{module}");
    }
    // Whole components: layer 1 is not layer 10, and the router is not gate_proj.
    for module in [
        "model.layers.10.mlp.up_proj",
        "model.layers.0.mlp.gate_proj",
        "model.my_lm_head",
    ] {
        assert!(!quantization.is_ignored(module, "Linear"), "{module}");
    }
}

#[test]
fn row_23_a_null_block_size_was_written_by_transformers() {
    let config =
        json!({ "quant_method": "fp8", "activation_scheme": "static", "weight_block_size": null });
    let found = resolved(&quantized(config), DOWN);
    assert_eq!(
        (found.weight, found.activations),
        (W::Tensor, A::StaticTensor)
    );
    assert_eq!(found.scale_name, "weight_scale_inv");
}

#[test]
fn row_23_skip_lists_may_hold_patterns() {
    let quantization = quantized(json!({
        "quant_method": "fp8", "ignored_layers": ["re:.*lm_head", "model.layers.[01].*proj"],
    }));
    assert!(quantization.is_ignored("model.lm_head", "Linear"));
    assert!(quantization.is_ignored("model.layers.1.mlp.up_proj", "Linear"));
    assert!(!quantization.is_ignored("model.layers.2.mlp.up_proj", "Linear"));
}

#[test]
fn presets() {
    let read = |groups: Value| quantized(json!({ "config_groups": groups, "ignore": ["lm_head"] }));
    let served = [
        ("FP8", W::Tensor, A::StaticTensor),
        ("FP8_DYNAMIC", W::Channel, A::DynamicToken),
        (
            "fp8_block",
            W::Block {
                rows: 128,
                cols: 128,
            },
            A::DynamicGroup(128),
        ),
    ];
    for (name, weight, activations) in served {
        let found = resolved(&read(json!({ name: ["Linear"] })), DOWN);
        assert_eq!(
            (found.group.as_str(), found.weight, found.activations),
            (name, weight, activations)
        );
    }
    let quantization =
        read(json!({ "FP8_DYNAMIC": ["Linear"], "NVFP4": ["re:.*down"], "W4A16": ["re:.*up"] }));
    assert_eq!(
        resolved(&quantization, "model.layers.0.mlp.gate_proj").group,
        "FP8_DYNAMIC"
    );
    let error = quantization
        .resolve(DOWN, "Linear")
        .expect_err("not served")
        .to_string();
    assert!(error.contains("group `NVFP4`"), "{error}");
    assert_eq!(
        read(json!({ "UNQUANTIZED": ["Linear"] })).resolve(DOWN, "Linear"),
        Ok(None)
    );
    for refused in [
        "NVFP4A16",
        "MXFP4",
        "MXFP4A16",
        "MXFP8",
        "MXFP8A16",
        "W8A8",
        "INT8",
        "W4AFP8",
        "W4A16_ASYM",
        "W2A4",
        "W8A16",
    ] {
        assert!(matches!(
            read(json!({ refused: ["Linear"] })).resolve(DOWN, "Linear"),
            Err(Error::Unsupported { group, .. }) if group == refused
        ));
    }
    for unknown in ["FP9", "W1A16", "W8A4", "W4A15", "WxAy", ""] {
        let error = QuantizationConfig::from_model_config(
            &json!({ "quantization_config": { "config_groups": { unknown: ["Linear"] } } }),
        )
        .expect_err("no such preset");
        assert!(matches!(&error, Error::UnknownPreset { name, .. } if name == unknown));
        assert!(error.to_string().contains("FP8_DYNAMIC"), "{error}");
    }
}

#[test]
fn not_quantized() {
    for config in [
        json!({}),
        json!({ "quantization_config": null }),
        json!({ "text_config": { "hidden_size": 8 } }),
    ] {
        assert!(
            QuantizationConfig::from_model_config(&config)
                .expect("reads")
                .is_none()
        );
    }
}

#[test]
fn remove_leaves_the_rest_alone() {
    let inner = json!({ "quant_method": "fp8" });
    let mut config = json!({
        "model_type": "llama", "quantization_config": inner, "text_config": { "a": 1, "quantization_config": inner },
        "compression_config": inner, "hidden_size": 8,
    });
    QuantizationConfig::remove_from(&mut config);
    assert_eq!(
        config.to_string(),
        r#"{"model_type":"llama","text_config":{"a":1},"hidden_size":8}"#
    );
    QuantizationConfig::remove_from(&mut Value::Null);
}
