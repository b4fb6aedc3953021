//! No JSON makes the crate panic, and what it accepts it also answers questions about.

use compressed_tensors::QuantizationConfig;
use proptest::prelude::*;
use serde_json::{Map, Value, json};

/// Words that lead deep into the reader.
const KEYS: &[&str] = &[
    "quantization_config",
    "text_config",
    "compression_config",
    "sparsity_config",
    "transform_config",
    "quant_method",
    "config_groups",
    "group_0",
    "FP8_DYNAMIC",
    "targets",
    "weights",
    "input_activations",
    "output_activations",
    "format",
    "ignore",
    "kv_cache_scheme",
    "run_compressed",
    "num_bits",
    "type",
    "symmetric",
    "group_size",
    "strategy",
    "block_structure",
    "dynamic",
    "actorder",
    "scale_dtype",
    "observer_kwargs",
    "activation_scheme",
    "weight_block_size",
    "ignored_layers",
    "modules_to_not_convert",
    "fmt",
    "sparsity_structure",
];

const WORDS: &[&str] = &[
    "compressed-tensors",
    "fp8",
    "float",
    "int",
    "tensor",
    "channel",
    "group",
    "block",
    "token",
    "tensor_group",
    "attn_head",
    "local",
    "static",
    "weight",
    "128x128",
    "0x1",
    "9999999999999999999x1",
    "float-quantized",
    "pack-quantized",
    "2:4",
    "Linear",
    "lm_head",
    "re:.*",
    "re:(",
    "re:[a-",
    "re:a{,9}",
    "re:\\",
    "re:(?",
    "re:{",
    "re:[",
    "re:[^",
    "re:é{é}[é",
    "torch.uint8",
    "torch.",
    "",
    ".",
];

fn leaf() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        prop::sample::select(vec![
            json!(8),
            json!(-1),
            json!(0),
            json!(128),
            json!(1u64 << 63),
            json!(1e308),
            json!(0.5)
        ]),
        any::<i64>().prop_map(Value::from),
        prop::sample::select(WORDS).prop_map(Value::from),
        "(re:)?\\PC{0,12}".prop_map(Value::from),
    ]
}

fn key() -> impl Strategy<Value = String> {
    prop_oneof![9 => prop::sample::select(KEYS).prop_map(str::to_string), 1 => "\\PC{0,6}"]
}

fn value() -> impl Strategy<Value = Value> {
    leaf().prop_recursive(6, 64, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((key(), inner), 0..6)
                .prop_map(|entries| Value::Object(entries.into_iter().collect::<Map<_, _>>())),
        ]
    })
}

fn ask(config: &Value) {
    let Ok(Some(found)) = QuantizationConfig::from_model_config(config) else {
        return;
    };
    for module in ["", ".", "lm_head", "model.layers.0.mlp.down_proj", "é"] {
        for class in ["Linear", "Embedding", ""] {
            let scheme = found.scheme(module, class);
            assert!(!(found.is_ignored(module, class) && scheme.is_some()));
            if let Ok(Some(resolved)) = found.resolve(module, class) {
                assert_eq!(Some(&resolved.group), scheme.map(|scheme| &scheme.group));
            }
        }
    }
    let _ = found.resolve_kv_cache();
    let _ = found.unmatched_targets([("lm_head", "Linear")].into_iter());
    let _ = format!("{found:?}");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(1000) })]

    #[test]
    fn any_json(config in value()) {
        ask(&config);
        QuantizationConfig::remove_from(&mut config.clone());
    }

    #[test]
    fn any_quantization_config(config in value()) {
        ask(&json!({ "quantization_config": config }));
    }

    #[test]
    fn any_args(args in prop::collection::vec((key(), leaf()), 0..6), inputs in value()) {
        let args: Map<String, Value> = args.into_iter().collect();
        ask(&json!({ "quantization_config": { "config_groups": {
            "group_0": { "targets": ["Linear"], "weights": args, "input_activations": inputs }
        }}}));
    }

    #[test]
    fn any_legacy_config(entries in prop::collection::vec((key(), leaf()), 0..6)) {
        let mut config: Map<String, Value> = entries.into_iter().collect();
        config.insert("quant_method".to_string(), json!("fp8"));
        ask(&json!({ "quantization_config": config }));
    }

    #[test]
    fn any_pattern(pattern in "[a-c.*+?{}\\[\\]()|^$\\\\,0-9&~é!<=:P-]{0,16}") {
        ask(&json!({ "quantization_config": { "config_groups": {
            "group_0": { "targets": [format!("re:{pattern}")], "weights": { "type": "float" } }
        }, "ignore": [format!("re:x{pattern}")] }}));
    }
}
