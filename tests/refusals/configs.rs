//! Quantization configs that are malformed, or that describe what no op serves.

use candle_compressed_tensors::Error;
use compressed_tensors::Error as ConfigError;
use serde_json::{Value, json};

use crate::{
    assert_refused, refused,
    support::{changed, dir, fixture, fixtures},
};

/// `llama-channel-token` with `value` at this place of its quantization config.
fn config(name: &str, pointer: &str, value: Value) -> std::path::PathBuf {
    changed(
        "llama-channel-token",
        &format!("refusals-{name}"),
        |_, config| {
            let place = config["quantization_config"].pointer_mut(pointer);
            *place.unwrap_or_else(|| panic!("no {pointer}")) = value;
        },
    )
}

const WEIGHTS: &str = "/config_groups/group_0/weights";
const PATH: &str = "config.json: `quantization_config.config_groups.group_0";

#[test]
fn unknown_words_and_numbers() {
    for (name, key, value, problem) in [
        (
            "strategy",
            "strategy",
            json!("row"),
            "unknown value `row`, expected one of tensor, channel, group, block, token, tensor_group, attn_head",
        ),
        (
            "type",
            "type",
            json!("complex"),
            "unknown value `complex`, expected one of int, float",
        ),
        (
            "dynamic",
            "dynamic",
            json!("global"),
            "unknown value `global`, expected one of local",
        ),
        (
            "strategy-number",
            "strategy",
            json!(1),
            "expected a string, found 1",
        ),
        (
            "bits-0",
            "num_bits",
            json!(0),
            "expected a number of bits from 1 to 64, found 0",
        ),
        (
            "bits-65",
            "num_bits",
            json!(65),
            "expected a number of bits from 1 to 64, found 65",
        ),
        (
            "bits-negative",
            "num_bits",
            json!(-8),
            "expected a number of bits from 1 to 64, found -8",
        ),
        (
            "bits-half",
            "num_bits",
            json!(8.5),
            "expected a whole number, found 8.5",
        ),
        (
            "bits-word",
            "num_bits",
            json!("8"),
            "expected a whole number, found \"8\"",
        ),
        (
            "group-size",
            "group_size",
            json!(-2),
            "expected a positive group size, or -1 for whole rows, found -2",
        ),
        (
            "block",
            "block_structure",
            json!([0, 128]),
            "expected two positive whole numbers, [rows, cols], found [0,128]",
        ),
    ] {
        let dir = config(name, &format!("{WEIGHTS}/{key}"), value);
        assert_refused!(
            dir,
            Error::Config(ConfigError::UnknownValue { .. } | ConfigError::Malformed { .. }),
            format!("{PATH}.weights.{key}`: {problem}")
        );
    }
}

#[test]
fn keys_that_the_format_forbids() {
    let dir = changed("llama-channel-token", "refusals-key", |_, config| {
        config["quantization_config"]["config_groups"]["group_0"]["scaling"] = json!("log");
    });
    assert_refused!(
        dir,
        Error::Config(ConfigError::UnknownKey { .. }),
        format!(
            "{PATH}`: unknown key `scaling`, expected only targets, weights, input_activations, output_activations, \
             format; the file may be newer than this crate"
        )
    );
}

#[test]
fn schemes_that_no_op_serves() {
    let module = "module `model.layers.0.mlp.down_proj`, group `group_0`: ";
    let served =
        "served are FP8 (8-bit float, symmetric) weights with strategy tensor, channel or block";
    for (name, pointer, value, reason) in [
        (
            "bits-3",
            "weights/num_bits",
            json!(3),
            format!("weights of FP3 channel are not served; {served}"),
        ),
        (
            "bits-16",
            "weights/num_bits",
            json!(16),
            format!("weights of FP16 channel are not served; {served}"),
        ),
        (
            "int8",
            "weights/type",
            json!("int"),
            format!("weights of INT8 channel are not served; {served}"),
        ),
        (
            "asymmetric",
            "weights/symmetric",
            json!(false),
            format!("weights with zero points (symmetric = false) are not served; {served}"),
        ),
        (
            "static-token",
            "input_activations/num_bits",
            json!(4),
            format!("input_activations of FP4 token, dynamic are not served; {served}"),
        ),
        (
            "outputs",
            "output_activations",
            json!({"num_bits": 8, "type": "float"}),
            "quantized outputs (FP8 tensor) are not served; expected no output_activations".into(),
        ),
        (
            "format",
            "format",
            json!("pack-quantized"),
            "format pack-quantized is not served; expected float-quantized or naive-quantized"
                .into(),
        ),
    ] {
        let dir = config(name, &format!("/config_groups/group_0/{pointer}"), value);
        assert_refused!(
            dir,
            Error::Config(ConfigError::Unsupported { .. }),
            format!("{module}{reason}")
        );
    }
    let dir = config(
        "transform",
        "/transform_config",
        json!({"config_groups": {"u": {}}}),
    );
    assert_refused!(
        dir,
        Error::Config(ConfigError::Unsupported { .. }),
        format!(
            "{module}transforms (transform_config) are not served: without their rotations the outputs would be wrong"
        )
    );
}

/// What of a checkpoint's refusal is told by the format's own name for it.
const TOLD_AS: [(&str, &str); 4] = [
    ("llama-fp8-int4", "weights of INT4 group 16 are not served"),
    ("llama-fp8-nvfp4", "NVFP4"),
    ("llama-mxfp8", "MXFP8"),
    (
        "llama-sparse24",
        "sparse weights (2:4, sparse-24-bitmask, sparsity_config) are not served",
    ),
];

#[test]
fn checkpoints_of_other_formats_are_refused_by_module_group_and_reason() {
    let mut refused_fixtures = 0;
    for fixture in fixtures() {
        let Some([module, group, _]) = &fixture.refusal else {
            continue;
        };
        let (_, reason) = (TOLD_AS.iter())
            .find(|(name, _)| *name == fixture.name)
            .unwrap_or_else(|| panic!("{}: a reason to look for", fixture.name));
        let error = refused(&dir(&fixture.name));
        let text = error.to_string();
        assert!(
            matches!(error, Error::Config(ConfigError::Unsupported { .. })),
            "{text}"
        );
        assert!(
            text.starts_with(&format!("module `{module}`, group `{group}`: ")),
            "{text}"
        );
        assert!(text.contains(reason), "{text}");
        refused_fixtures += 1;
    }
    assert_eq!(refused_fixtures, TOLD_AS.len());
}

#[test]
fn patterns_that_cannot_be_used() {
    let lookaround = "lookaround, (?=…) (?!…) (?<=…) (?<!…), is not supported; list the module names, or write the \
                      pattern without it";
    for (index, (pattern, reason)) in [
        ("(unclosed", "unclosed group"),
        ("[a-", "unclosed character class"),
        ("*", "repetition operator missing expression"),
        ("a{2,1}", "invalid repetition count range, the start must be <= the end"),
        (r"\p{Nothing}", "invalid Unicode character class"),
        ("(?!vision).*proj", lookaround),
        ("(?<=mlp).gate", lookaround),
        (
            r"(a)\1",
            "backreferences are not supported; list the module names, or write the pattern without them",
        ),
    ]
    .into_iter()
    .enumerate()
    {
        for (list, at) in [
            ("/config_groups/group_0/targets", ".config_groups.group_0"),
            ("/ignore", ".ignore"),
        ] {
            let dir = config(
                &format!("pattern-{index}"),
                list,
                json!(["Linear", format!("re:{pattern}")]),
            );
            assert_refused!(
                dir,
                Error::Config(ConfigError::Pattern { .. }),
                format!(
                    "config.json: `quantization_config{at}`: the pattern `{pattern}` cannot be used: {reason}"
                )
            );
        }
    }
}

#[test]
fn patterns_that_blow_up() {
    let started = std::time::Instant::now();
    for (index, pattern) in ["(a{1000}){1000}", r"((\w{100}){100}){100}"]
        .into_iter()
        .enumerate()
    {
        let dir = config(
            &format!("blow-up-{index}"),
            "/ignore",
            json!([format!("re:{pattern}")]),
        );
        assert_refused!(
            dir,
            Error::Config(ConfigError::PatternTooBig { .. }),
            format!(
                "config.json: `quantization_config.ignore`: the pattern `{pattern}` is refused: compiled it exceeds \
                 10485760 bytes; write it with smaller repetitions"
            )
        );
    }
    // What makes a backtracking engine run for ever is merely a pattern that does not match.
    let dir = config(
        "backtracking",
        "/ignore",
        json!(["lm_head", "re:((.*)*)*x{1,9}$"]),
    );
    crate::load(&dir, Default::default()).unwrap();
    assert!(started.elapsed().as_secs() < 20, "{:?}", started.elapsed());
}

#[test]
fn groups_that_say_nothing() {
    let empty = "config.json: `quantization_config.config_groups` is empty: the checkpoint calls itself quantized but \
                 says of no module how; expected at least one group with targets and weights";
    for (name, groups) in [("groups-empty", json!({})), ("groups-null", Value::Null)] {
        assert_refused!(
            config(name, "/config_groups", groups),
            Error::Config(ConfigError::EmptyConfigGroups { .. }),
            empty
        );
    }
    assert_refused!(
        config("groups-list", "/config_groups", json!([1])),
        Error::Config(ConfigError::Malformed { .. }),
        "config.json: `quantization_config.config_groups`: expected an object, found [1]"
    );
    assert_refused!(
        config(
            "group-preset",
            "/config_groups",
            json!({"FP8_MAGIC": ["Linear"]})
        ),
        Error::Config(ConfigError::UnknownPreset { .. }),
        "config.json: `quantization_config.config_groups.FP8_MAGIC`: a list of targets makes `FP8_MAGIC` a preset's \
         name, and there is no such preset; expected FP8, FP8_DYNAMIC, FP8_BLOCK, or an object with `targets` and \
         `weights`"
    );
    let dir = changed("llama-channel-token", "refusals-no-targets", |_, config| {
        let group = &mut config["quantization_config"]["config_groups"]["group_0"];
        group.as_object_mut().unwrap().remove("targets");
    });
    assert_refused!(
        dir,
        Error::Config(ConfigError::Malformed { .. }),
        format!(
            "{PATH}.targets`: expected a list of module names, class names or re: patterns, found nothing"
        )
    );
}

#[test]
fn methods_that_are_not_ours() {
    for method in ["gptq", "awq", "bitsandbytes", "mxfp4", ""] {
        assert_refused!(
            config("method", "/quant_method", json!(method)),
            Error::Config(ConfigError::UnsupportedMethod { .. }),
            format!(
                "config.json: `quantization_config.quant_method`: quant_method `{method}` is not served; expected \
                 \"compressed-tensors\" or \"fp8\": load a checkpoint quantized to FP8"
            )
        );
    }
    let dir = changed("llama-channel-token", "refusals-no-method", |_, config| {
        config["quantization_config"] = json!({"bits": 4});
    });
    assert_refused!(
        dir,
        Error::Config(ConfigError::MissingMethod { .. }),
        "config.json: `quantization_config` names no quant_method and has no config_groups; expected quant_method \
         \"compressed-tensors\" or \"fp8\""
    );
    let dir = changed(
        "llama-channel-token",
        "refusals-config-word",
        |_, config| {
            config["quantization_config"] = json!("fp8");
        },
    );
    assert_refused!(
        dir,
        Error::Config(ConfigError::Malformed { .. }),
        "config.json: `quantization_config`: expected an object, found \"fp8\""
    );
    // A scale format that changes what activations mean.
    let dir = changed("qwen3-block-fp8", "refusals-ue8m0", |_, config| {
        config["quantization_config"]["scale_fmt"] = json!("ue8m0");
    });
    assert_refused!(
        dir,
        Error::Config(ConfigError::UnknownValue { .. }),
        "config.json: `quantization_config.scale_fmt`: unknown value `ue8m0`, expected one of float"
    );
}

#[test]
fn the_config_that_all_of_these_change_loads() {
    fixture("llama-channel-token").quantizer(crate::support::Mode::AsCheckpoint);
}
