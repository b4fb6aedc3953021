//! How args and schemes are read: defaults, inference, contradictions. Cases marked in comments as refused upstream
//! were run through compressed-tensors 0.19.0.

use compressed_tensors::{
    ActivationOrdering, Dynamic, Error, QuantizationArgs, QuantizationConfig, QuantizationType,
    Strategy,
};
use serde_json::{Value, json};

fn parse(args: Value) -> Result<QuantizationArgs, Error> {
    let config = json!({ "quantization_config": {
        "config_groups": { "group_0": { "targets": ["Linear"], "weights": args } },
    }});
    let found = QuantizationConfig::from_model_config(&config)?.expect("quantized");
    Ok(found.groups()[0].weights.clone().expect("has weights"))
}

#[test]
fn defaults() {
    let args = parse(json!({})).expect("reads");
    assert_eq!((args.num_bits, args.kind), (8, QuantizationType::Int));
    assert_eq!(
        (args.symmetric, args.strategy, args.dynamic),
        (true, Strategy::Tensor, Dynamic::No)
    );
    assert_eq!(
        (args.group_size, args.block_structure, args.actorder),
        (None, None, None)
    );
    let nulls = json!({
        "num_bits": null, "type": null, "symmetric": null, "group_size": null, "strategy": null, "dynamic": null,
        "block_structure": null, "actorder": null, "scale_dtype": null, "zp_dtype": null, "observer": null,
        "observer_kwargs": null,
    });
    assert_eq!(parse(nulls), Ok(args));
}

#[test]
fn strategy_is_inferred_from_group_size() {
    let strategy = |args| parse(args).map(|args| args.strategy);
    assert_eq!(strategy(json!({})), Ok(Strategy::Tensor));
    assert_eq!(strategy(json!({ "group_size": 128 })), Ok(Strategy::Group));
    assert_eq!(strategy(json!({ "group_size": -1 })), Ok(Strategy::Channel));
    assert_eq!(
        strategy(json!({ "group_size": -1, "strategy": "channel" })),
        Ok(Strategy::Channel)
    );
    assert_eq!(
        strategy(json!({ "group_size": -1, "strategy": "tensor" })),
        Ok(Strategy::Tensor)
    );
    assert_eq!(
        strategy(json!({ "group_size": 0, "strategy": "tensor" })),
        Ok(Strategy::Tensor)
    );
    assert!(matches!(
        strategy(json!({ "group_size": 0 })),
        Err(Error::InvalidArgs { .. })
    ));
    assert!(matches!(
        strategy(json!({ "group_size": -2 })),
        Err(Error::Malformed { .. })
    ));
}

#[test]
fn words_are_read_in_any_case() {
    let args = parse(json!({ "strategy": "CHANNEL", "type": "Float" })).expect("reads");
    assert_eq!(
        (args.strategy, args.kind),
        (Strategy::Channel, QuantizationType::Float)
    );
}

#[test]
fn block_structure_has_two_spellings() {
    let block = |structure: Value| {
        parse(json!({ "type": "float", "strategy": "block", "block_structure": structure }))
            .map(|args| args.block_structure)
    };
    assert_eq!(block(json!([128, 64])), Ok(Some([128, 64])));
    assert_eq!(block(json!("128x64")), Ok(Some([128, 64])));
    assert_eq!(block(json!("128 x 64")), Ok(Some([128, 64])));
    for wrong in [
        json!([128]),
        json!([128, 0]),
        json!([-1, 128]),
        json!("128"),
        json!("128x128x1"),
        json!("axb"),
        json!(128),
        json!([1.5, 2]),
        json!({}),
    ] {
        let error = block(wrong.clone()).expect_err("no block");
        assert!(
            matches!(&error, Error::Malformed { path, .. } if path.ends_with("weights.block_structure")),
            "{wrong}"
        );
    }
}

#[test]
fn actorder() {
    let order = |order: Value| parse(json!({ "actorder": order })).map(|args| args.actorder);
    assert_eq!(order(json!("weight")), Ok(Some(ActivationOrdering::Weight)));
    assert_eq!(order(json!("static")), Ok(Some(ActivationOrdering::Weight)));
    assert_eq!(order(json!("group")), Ok(Some(ActivationOrdering::Group)));
    assert_eq!(order(json!("dynamic")), Ok(Some(ActivationOrdering::Group)));
    assert_eq!(order(json!(true)), Ok(Some(ActivationOrdering::Group)));
    assert_eq!(order(json!(false)), Ok(None));
    assert!(matches!(
        order(json!("sideways")),
        Err(Error::UnknownValue { .. })
    ));
}

#[test]
fn dtypes_lose_their_prefix() {
    let args = parse(json!({ "scale_dtype": "torch.uint8", "zp_dtype": "int8" })).expect("reads");
    assert_eq!(
        (args.scale_dtype.as_deref(), args.zp_dtype.as_deref()),
        (Some("uint8"), Some("int8"))
    );
}

#[test]
fn contradictions_are_refused() {
    // All refused upstream.
    let cases = [
        (json!({ "strategy": "group" }), "group_size"),
        (json!({ "strategy": "tensor_group" }), "group_size"),
        (
            json!({ "strategy": "channel", "group_size": 128 }),
            "group_size 128",
        ),
        (json!({ "strategy": "block" }), "block_structure"),
        (json!({ "block_structure": [128, 128] }), "block_structure"),
        (json!({ "strategy": "token" }), "dynamic"),
        (json!({ "strategy": "channel", "dynamic": true }), "dynamic"),
        (
            json!({ "strategy": "attn_head", "dynamic": true }),
            "dynamic",
        ),
        (
            json!({ "strategy": "tensor", "dynamic": "local" }),
            "tensor_group",
        ),
    ];
    for (args, part) in cases {
        let error = parse(args.clone()).expect_err("contradicts itself");
        assert!(
            matches!(error, Error::InvalidArgs { .. }),
            "{args}: {error:?}"
        );
        let text = error.to_string();
        assert!(
            text.contains(part) && text.contains("config_groups.group_0.weights"),
            "{text}"
        );
    }
}

#[test]
fn unknown_words_and_keys_are_refused() {
    let unknown = [
        (json!({ "strategy": "rows" }), "strategy", "rows"),
        (json!({ "type": "posit" }), "type", "posit"),
        (json!({ "dynamic": "sometimes" }), "dynamic", "sometimes"),
    ];
    for (args, key, word) in unknown {
        let error = parse(args).expect_err("unknown");
        assert!(
            matches!(&error, Error::UnknownValue { path, found, .. } if path.ends_with(key) && found == word)
        );
        assert!(error.to_string().contains("expected one of"), "{error}");
    }
    let error = parse(json!({ "num_bits": 8, "rotation": 3 })).expect_err("unknown key");
    assert!(matches!(&error, Error::UnknownKey { key, .. } if key == "rotation"));
    assert!(error.to_string().contains("num_bits"), "{error}");
}

#[test]
fn wrong_types_are_refused() {
    let cases = [
        json!({ "num_bits": "eight" }),
        json!({ "num_bits": 0 }),
        json!({ "num_bits": -8 }),
        json!({ "num_bits": 8.5 }),
        json!({ "num_bits": 1e300 }),
        json!({ "num_bits": 18446744073709551615u64 }),
        json!({ "type": 8 }),
        json!({ "symmetric": "yes" }),
        json!({ "dynamic": 1 }),
        json!({ "group_size": [128] }),
        json!({ "scale_dtype": 8 }),
        json!({ "observer_kwargs": [] }),
        json!("fp8"),
    ];
    for args in cases {
        assert!(
            matches!(parse(args.clone()), Err(Error::Malformed { .. })),
            "{args}"
        );
    }
    assert_eq!(
        parse(json!({ "num_bits": 8.0 })).map(|args| args.num_bits),
        Ok(8)
    );
}

#[test]
fn args_have_names() {
    let name = |args| parse(args).expect("reads").to_string();
    assert_eq!(
        name(json!({ "type": "float", "strategy": "channel" })),
        "FP8 channel"
    );
    assert_eq!(
        name(json!({ "type": "float", "strategy": "token", "dynamic": true })),
        "FP8 token, dynamic"
    );
    assert_eq!(
        name(json!({ "num_bits": 4, "group_size": 128 })),
        "INT4 group 128"
    );
    assert_eq!(
        name(
            json!({ "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "dynamic": "local" })
        ),
        "NVFP4 tensor_group 16, dynamic local"
    );
    assert_eq!(
        name(json!({ "num_bits": 4, "type": "float", "group_size": 32 })),
        "MXFP4 group 32"
    );
    assert_eq!(
        name(json!({ "type": "float", "strategy": "block", "block_structure": [128, 64] })),
        "FP8 block 128x64"
    );
}
