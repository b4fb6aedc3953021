//! Scales of the KV cache that are missing, stray or misshapen.

use candle_compressed_tensors::{Error, LoadOptions};
use safetensors::Dtype;
use serde_json::json;

use crate::{
    assert_refused, load, problems, refused,
    support::{Mode, changed},
};

const ATTENTION: &str = "model.layers.1.self_attn";

/// Missing where it is needed: refused unless the model, and its cache with it, is dequantized.
fn assert_missing(dir: &std::path::Path, attention: &str, scale: &str) {
    for mode in [Mode::AsCheckpoint, Mode::PerToken, Mode::Full] {
        let error = load(dir, mode.options()).err().expect("a refusal");
        assert!(matches!(error, Error::MissingKvScale { .. }), "{error:?}");
        assert_eq!(
            error.to_string(),
            format!(
                "{attention}: the KV cache is quantized, but \"{attention}.{scale}\" is not in the checkpoint; load \
                 with `dequantize`, under which the cache keeps its precision"
            )
        );
    }
    load(dir, Mode::Dequantized.options()).unwrap();
}

#[test]
fn a_scheme_without_scales() {
    let dir = changed("llama-kv", "refusals-kv-none", |tensors, _| {
        tensors.retain(|name, _| !name.ends_with("k_scale") && !name.ends_with("v_scale"));
    });
    assert_missing(&dir, "model.layers.0.self_attn", "k_scale");
    assert_eq!(problems(&dir).len(), 4, "two scales in two layers");
}

#[test]
fn one_scale_that_is_missing() {
    for scale in ["k_scale", "v_scale"] {
        // With the scheme, and without it: the other scales say that the cache is quantized.
        for scheme in [true, false] {
            let name = format!("refusals-kv-{scale}-{scheme}");
            let dir = changed("llama-kv", &name, |tensors, config| {
                tensors.remove(&format!("{ATTENTION}.{scale}")).unwrap();
                if !scheme {
                    config["quantization_config"]["kv_cache_scheme"] = json!(null);
                }
            });
            assert_missing(&dir, ATTENTION, scale);
        }
    }
    let attention = "model.layers.0.self_attn";
    let dir = changed("llama-kv-old-names", "refusals-kv-old", |tensors, _| {
        let name = format!("{attention}.v_proj.output_scale");
        tensors.remove(&name).unwrap();
    });
    assert_missing(&dir, attention, "v_scale");
}

#[test]
fn a_scheme_without_attentions() {
    let dir = changed("llama-kv", "refusals-kv-nowhere", |tensors, _| {
        tensors.retain(|name, _| !name.contains("self_attn"));
    });
    let error = load(&dir, LoadOptions::default()).err().unwrap();
    assert!(matches!(error, Error::Unsupported { .. }), "{error:?}");
    assert_eq!(
        error.to_string(),
        "kv_cache_scheme: the KV cache is quantized, but the checkpoint has neither scales for it nor a k_proj that \
         they belong to"
    );
}

#[test]
fn stray_scales() {
    for (name, from, tensor, reason) in [
        (
            "kv-q",
            "llama-kv",
            format!("{ATTENTION}.q_scale"),
            ": quantized attention (a scale for queries) is not served",
        ),
        (
            "kv-output",
            "llama-kv",
            format!("{ATTENTION}.o_proj.output_scale"),
            ": scales of quantized outputs are served for the KV cache alone",
        ),
    ] {
        let dir = changed(from, &format!("refusals-{name}"), |tensors, _| {
            let scale = tensors[&format!("{ATTENTION}.k_scale")].clone();
            tensors.insert(tensor.clone(), scale);
        });
        assert_refused!(dir, Error::Unsupported { .. }, format!("{tensor}{reason}"));
    }
    // One level off: no model would ask for them.
    let dir = changed("llama-kv", "refusals-kv-orphan", |tensors, _| {
        let scale = tensors[&format!("{ATTENTION}.k_scale")].clone();
        tensors.insert(format!("{ATTENTION}.attn.k_scale"), scale);
    });
    assert_refused!(
        dir,
        Error::OrphanScale { .. },
        format!(
            "{ATTENTION}.attn.k_scale: a scale without its FP8 weight (\"{ATTENTION}.attn\" has no weights in the \
             checkpoint)"
        )
    );
}

#[test]
fn one_scale_under_both_names() {
    let dir = changed("llama-kv", "refusals-kv-both", |tensors, _| {
        let scale = tensors[&format!("{ATTENTION}.k_scale")].clone();
        tensors.insert(format!("{ATTENTION}.k_proj.output_scale"), scale);
    });
    assert_refused!(
        dir,
        Error::DuplicateTensor { .. },
        format!(
            "tensor \"{ATTENTION}.k_scale\" is stored twice: in \"{ATTENTION}.k_proj.output_scale\" and in \
             \"{ATTENTION}.k_scale\""
        )
    );
}

#[test]
fn shapes() {
    let name = "model.layers.0.self_attn.v_scale";
    for (index, shape) in [
        &[3, 1, 1][..],
        &[1, 2, 1],
        &[2],
        &[2, 1],
        &[0, 1, 1],
        &[1, 1, 1, 1],
    ]
    .into_iter()
    .enumerate()
    {
        let dir = changed(
            "llama-kv-head",
            &format!("refusals-kv-shape-{index}"),
            |tensors, _| {
                let scale = tensors.get_mut(name).unwrap();
                scale.recast(Dtype::BF16, shape);
                scale.fill(1.);
            },
        );
        assert_refused!(
            dir,
            Error::Shape { .. },
            format!("{name}: expected shape [], [1] or [2, 1, 1], found {shape:?}")
        );
    }
}

#[test]
fn schemes_that_are_not_served() {
    for (name, pointer, value, reason) in [
        (
            "kv-int8",
            "type",
            json!("int"),
            "a cache of INT8 tensor is not served",
        ),
        (
            "kv-dynamic",
            "dynamic",
            json!(true),
            "a cache of FP8 tensor, dynamic is not served",
        ),
        (
            "kv-asymmetric",
            "symmetric",
            json!(false),
            "zero points (symmetric = false) are not served",
        ),
    ] {
        let dir = changed("llama-kv", &format!("refusals-{name}"), |_, config| {
            config["quantization_config"]["kv_cache_scheme"][pointer] = value;
        });
        let error = refused(&dir);
        let compressed_tensors::Error::UnsupportedKvCache { .. } = (match &error {
            Error::Config(error) => error,
            _ => panic!("{error:?}"),
        }) else {
            panic!("{error:?}")
        };
        assert_eq!(
            error.to_string(),
            format!(
                "kv_cache_scheme: {reason}; served is FP8 (8-bit float, symmetric, static) with strategy tensor or \
                 attn_head"
            )
        );
    }
}
