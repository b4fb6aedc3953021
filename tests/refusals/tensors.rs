//! Tensors that do not fit the config: FP8 weights without scheme or scale, orphan scales, wrong dtypes and shapes.

use std::path::PathBuf;

use candle_compressed_tensors::{Activations, Error, LoadOptions};
use safetensors::Dtype;
use serde_json::json;

use crate::{
    assert_refused, load, problems,
    support::{Raw, changed, fixture},
};

const DOWN: &str = "model.layers.0.mlp.down_proj";

/// `llama-channel-token` with one tensor more.
fn with(name: &str, tensor: &str, dtype: Dtype, shape: &[usize]) -> PathBuf {
    changed("llama-channel-token", name, |tensors, _| {
        let mut raw = Raw {
            dtype: Dtype::F32,
            shape: vec![shape.iter().product()],
            bytes: vec![0; 4 * shape.iter().product::<usize>()],
        };
        raw.fill(1.);
        raw.recast(dtype, shape);
        tensors.insert(tensor.into(), raw);
    })
}

/// `llama-channel-token` with `model.layers.0.mlp.down_proj.weight` stored otherwise.
fn recast(name: &str, dtype: Dtype, shape: &[usize]) -> PathBuf {
    changed("llama-channel-token", name, |tensors, _| {
        let weight = tensors.get_mut(&format!("{DOWN}.weight")).unwrap();
        weight.recast(dtype, shape);
    })
}

#[test]
fn fp8_weights_without_a_scale() {
    for (name, from, strategy, scale) in [
        (
            "no-scale-channel",
            "llama-channel-token",
            "channel",
            "weight_scale",
        ),
        (
            "no-scale-tensor",
            "llama-tensor-static",
            "tensor",
            "weight_scale",
        ),
        (
            "no-scale-block",
            "llama-block-group",
            "block 128x128",
            "weight_scale",
        ),
        (
            "no-scale-inv",
            "qwen3-block-fp8",
            "block 128x128",
            "weight_scale_inv",
        ),
    ] {
        // The block size of the last one is the fixture's own.
        let [rows, cols] = match from {
            "qwen3-block-fp8" => {
                let checkpoint = fixture(from).checkpoint();
                let block = &checkpoint.config()["quantization_config"]["weight_block_size"];
                [block[0].to_string(), block[1].to_string()]
            }
            _ => ["128".into(), "128".into()],
        };
        let strategy = strategy.replace("128x128", &format!("{rows}x{cols}"));
        let dir = changed(from, &format!("refusals-{name}"), |tensors, _| {
            tensors.remove(&format!("{DOWN}.{scale}")).unwrap();
        });
        assert_refused!(
            dir,
            Error::MissingScale { .. },
            format!(
                "{DOWN}.weight: stored as F8_E4M3 ({strategy}), but \"{DOWN}.{scale}\" is not in the checkpoint"
            )
        );
    }
}

#[test]
fn fp8_weights_without_a_scheme() {
    let no_scheme = |tensor: &str, reason: &str| {
        format!(
            "{tensor}: stored as F8_E4M3, but {reason}; without a scheme its codes have no meaning"
        )
    };
    let first = "model.layers.0.mlp.down_proj.weight";
    let dir = changed("llama-channel-token", "refusals-no-config", |_, config| {
        config
            .as_object_mut()
            .unwrap()
            .remove("quantization_config");
    });
    assert_refused!(
        dir,
        Error::NoScheme { .. },
        no_scheme(first, "config.json has no quantization_config")
    );

    for (name, entry) in [
        ("ignored-name", "model.layers.0.mlp.down_proj"),
        ("ignored-pattern", "re:.*down_proj"),
        ("ignored-class", "Linear"),
    ] {
        let name = format!("refusals-{name}");
        let dir = changed("llama-channel-token", &name, |_, config| {
            config["quantization_config"]["ignore"] = json!(["lm_head", entry]);
        });
        assert_refused!(
            dir,
            Error::NoScheme { .. },
            no_scheme(first, "the config's `ignore` names its module")
        );
    }

    let dir = changed("llama-channel-token", "refusals-untargeted", |_, config| {
        config["quantization_config"]["config_groups"]["group_0"]["targets"] =
            json!(["re:.*(q|k|v|o|gate|up)_proj"]);
    });
    assert_refused!(
        dir,
        Error::NoScheme { .. },
        no_scheme(first, "no config group targets its module")
    );

    for (tensor, reason) in [
        (
            "model.layers.0.mlp.down_proj.bias",
            "it is not the weight of a linear",
        ),
        (
            "model.layers.0.mlp.experts.gate_up_proj",
            "it is not the weight of a linear",
        ),
        (
            "model.embed_tokens.weight",
            "no config group targets its module",
        ),
        ("lm_head.weight", "the config's `ignore` names its module"),
    ] {
        let dir = with(
            &format!("refusals-{tensor}"),
            tensor,
            Dtype::F8_E4M3,
            &[160, 64],
        );
        assert_refused!(dir, Error::NoScheme { .. }, no_scheme(tensor, reason));
    }
}

#[test]
fn orphan_scales() {
    let orphan =
        |scale: &str, reason: &str| format!("{scale}: a scale without its FP8 weight ({reason})");
    for (scale, reason) in [
        ("lm_head.weight_scale", "\"lm_head.weight\" is BF16"),
        (
            "model.norm.weight_scale_inv",
            "\"model.norm.weight\" is BF16",
        ),
        (
            "model.layers.9.mlp.up_proj.weight_scale",
            "\"model.layers.9.mlp.up_proj.weight\" is not in the checkpoint",
        ),
        (
            "model.layers.0.mlp.up_proj.input_scale",
            "the config says that activations are dynamic token",
        ),
        (
            "model.layers.0.mlp.up_proj.weight_scale_inv",
            "the config gives \"model.layers.0.mlp.up_proj.weight\" the scale \"weight_scale\" alone",
        ),
        (
            "model.layers.0.mlp.up_proj.weight_zero_point",
            "the config gives \"model.layers.0.mlp.up_proj.weight\" the scale \"weight_scale\" alone",
        ),
        (
            "model.layers.0.mlp.up_proj.weight_global_scale",
            "the config gives \"model.layers.0.mlp.up_proj.weight\" the scale \"weight_scale\" alone",
        ),
    ] {
        let dir = with(&format!("refusals-{scale}"), scale, Dtype::F32, &[1]);
        assert_refused!(dir, Error::OrphanScale { .. }, orphan(scale, reason));
    }

    // A weight that lost its codes, and kept its scale.
    let dir = recast("refusals-orphan-of-dense", Dtype::BF16, &[64, 112]);
    assert_refused!(
        dir,
        Error::OrphanScale { .. },
        orphan(
            "model.layers.0.mlp.down_proj.weight_scale",
            "\"model.layers.0.mlp.down_proj.weight\" is BF16"
        )
    );

    let scale = format!("{DOWN}.input_scale");
    let dir = changed(
        "llama-weight-only-channel",
        "refusals-orphan-input",
        |tensors, _| {
            let mut raw = tensors[&format!("{DOWN}.weight_scale")].clone();
            raw.recast(Dtype::BF16, &[1]);
            tensors.insert(scale.clone(), raw);
        },
    );
    assert_refused!(
        dir,
        Error::OrphanScale { .. },
        orphan(&scale, "the config says that activations are none")
    );

    // The same scale under both of its names: which one counts?
    let dir = changed(
        "llama-tensor-static",
        "refusals-two-inputs",
        |tensors, _| {
            let raw = tensors[&scale].clone();
            tensors.insert(format!("{DOWN}.activation_scale"), raw);
        },
    );
    assert_refused!(
        dir,
        Error::OrphanScale { .. },
        orphan(
            &format!("{DOWN}.activation_scale"),
            "\"model.layers.0.mlp.down_proj.input_scale\" is there too"
        )
    );
}

#[test]
fn wrong_dtypes_of_weights() {
    for (name, dtype) in [
        ("weight-i8", Dtype::I8),
        ("weight-u8", Dtype::U8),
        ("weight-e5m2", Dtype::F8_E5M2),
        ("weight-e8m0", Dtype::F8_E8M0),
        ("weight-i32", Dtype::I32),
        ("weight-bool", Dtype::BOOL),
    ] {
        let dir = recast(&format!("refusals-{name}"), dtype, &[64, 112]);
        assert_refused!(
            dir,
            Error::Dtype { .. },
            format!("{DOWN}.weight: expected dtype F8_E4M3, BF16, F16 or F32, found {dtype:?}")
        );
    }
    // A packed weight, although the config knows of no packing.
    let dir = with(
        "refusals-packed",
        &format!("{DOWN}.weight_packed"),
        Dtype::BF16,
        &[2, 2],
    );
    assert_refused!(
        dir,
        Error::Unsupported { .. },
        format!(
            "{DOWN}.weight_packed: packed and sparse weights are not served; expected \"{DOWN}.weight\""
        )
    );
}

#[test]
fn wrong_shapes_of_weights() {
    for (name, shape, expected) in [
        ("rank-3", &[2, 32, 112][..], "[out, in]"),
        ("rank-1", &[64 * 112], "[out, in]"),
        ("rank-0", &[], "[out, in]"),
        ("no-rows", &[0, 112], "[out, in], neither of them 0"),
        ("no-columns", &[64, 0], "[out, in], neither of them 0"),
    ] {
        let dir = recast(&format!("refusals-{name}"), Dtype::F8_E4M3, shape);
        assert_refused!(
            dir,
            Error::Shape { .. },
            format!("{DOWN}.weight: expected shape {expected}, found {shape:?}")
        );
    }
}

#[test]
fn a_static_scheme_without_input_scale_needs_another_mode() {
    let dir = changed("llama-tensor-static", "refusals-no-input", |tensors, _| {
        tensors.remove(&format!("{DOWN}.input_scale")).unwrap();
    });
    let error = load(&dir, LoadOptions::default()).err().unwrap();
    assert!(
        matches!(error, Error::MissingInputScale { .. }),
        "{error:?}"
    );
    assert_eq!(
        error.to_string(),
        format!(
            "{DOWN}.weight: the config says that activations are static per tensor, but \"{DOWN}.input_scale\" is not \
             in the checkpoint; load with activations `per-token` or `full`, which do not need it"
        )
    );
    let activations = |activations| LoadOptions {
        activations,
        ..LoadOptions::default()
    };
    for options in [
        activations(Activations::PerToken),
        activations(Activations::Full),
        LoadOptions {
            dequantize: true,
            ..LoadOptions::default()
        },
        LoadOptions {
            modules_to_not_convert: vec!["model.layers.0.mlp.down_proj".into()],
            ..LoadOptions::default()
        },
    ] {
        let loaded = load(&dir, options.clone());
        assert!(loaded.is_ok(), "{options:?}: {:?}", loaded.err());
    }
}

#[test]
fn everything_that_is_wrong_is_reported_and_the_first_is_the_error() {
    let dir = changed("llama-channel-token", "refusals-several", |tensors, _| {
        tensors
            .remove("model.layers.0.mlp.gate_proj.weight_scale")
            .unwrap();
        tensors.remove("model.layers.1.mlp.up_proj.weight").unwrap();
        let scale = "model.layers.1.self_attn.q_proj.weight_scale";
        tensors.get_mut(scale).unwrap().set(5, 0.);
    });
    let problems = problems(&dir);
    let starts = [
        "model.layers.0.mlp.gate_proj.weight: ",
        "model.layers.1.mlp.up_proj.weight_scale: ",
        "model.layers.1.self_attn.q_proj.weight_scale: scale 0 at position 5",
    ];
    assert_eq!(problems.len(), starts.len(), "{problems:#?}");
    for (problem, start) in problems.iter().zip(starts) {
        assert!(problem.starts_with(start), "{problem}");
    }
    let error = load(&dir, LoadOptions::default()).err().unwrap();
    assert_eq!(error.to_string(), problems[0]);
}
