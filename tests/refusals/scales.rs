//! Scales whose shape, dtype or values cannot be right.

use std::path::PathBuf;

use candle_compressed_tensors::Error;
use safetensors::Dtype;

use crate::{
    assert_refused,
    support::{Raw, changed},
};

/// A fixture with one scale changed.
fn scale(from: &str, name: &str, scale: &str, change: impl FnOnce(&mut Raw)) -> PathBuf {
    changed(from, &format!("refusals-{name}"), |tensors, _| {
        change(
            tensors
                .get_mut(scale)
                .unwrap_or_else(|| panic!("no {scale}")),
        );
    })
}

#[test]
fn shapes() {
    // [64, 112] under channel, [64, 112] under tensor, [144, 272] in blocks of 128 × 128.
    let weight_scale = "model.layers.0.mlp.down_proj.weight_scale";
    let input_scale = "model.layers.0.mlp.down_proj.input_scale";
    let (channel, tensor, block) = (
        "[64] or [64, 1]",
        "[], [1] or [1, 1]",
        "[2, 3] (blocks of 128 × 128)",
    );
    for (index, (from, name, shape, expected)) in [
        ("llama-channel-token", weight_scale, &[63][..], channel),
        ("llama-channel-token", weight_scale, &[63, 1], channel),
        ("llama-channel-token", weight_scale, &[1], channel),
        ("llama-channel-token", weight_scale, &[1, 64], channel),
        ("llama-channel-token", weight_scale, &[112, 1], channel),
        ("llama-channel-token", weight_scale, &[64, 1, 1], channel),
        ("llama-channel-token", weight_scale, &[64, 2], channel),
        ("llama-channel-token", weight_scale, &[0, 1], channel),
        ("llama-tensor-static", weight_scale, &[64], tensor),
        ("llama-tensor-static", weight_scale, &[64, 1], tensor),
        ("llama-tensor-static", weight_scale, &[0], tensor),
        ("llama-tensor-static", weight_scale, &[1, 1, 1], tensor),
        ("llama-tensor-static", input_scale, &[2], tensor),
        ("llama-tensor-static", input_scale, &[112], tensor),
        ("llama-block-group", weight_scale, &[3, 2], block),
        ("llama-block-group", weight_scale, &[1, 2], block),
        ("llama-block-group", weight_scale, &[6], block),
        ("llama-block-group", weight_scale, &[144, 1], block),
    ]
    .into_iter()
    .enumerate()
    {
        let dir = scale(from, &format!("scale-shape-{index}"), name, |raw| {
            raw.recast(Dtype::BF16, shape);
            raw.fill(1.);
        });
        assert_refused!(
            dir,
            Error::Shape { .. },
            format!("{name}: expected shape {expected}, found {shape:?}")
        );
    }
}

#[test]
fn values() {
    let bad = [
        (f32::NAN, "NaN"),
        (0., "0"),
        (-0., "-0"),
        (-0.5, "-0.5"),
        (f32::INFINITY, "inf"),
        (f32::NEG_INFINITY, "-inf"),
    ];
    let weight_scale = "model.layers.0.mlp.down_proj.weight_scale";
    for (from, name, position) in [
        ("llama-channel-token", weight_scale, 63),
        ("llama-scales-f16", weight_scale, 7),
        ("llama-scales-f32", weight_scale, 7),
        ("llama-tensor-static", weight_scale, 0),
        (
            "llama-tensor-static",
            "model.layers.0.mlp.down_proj.input_scale",
            0,
        ),
        ("llama-block-group", weight_scale, 5),
        (
            "qwen3-moe-channel",
            "model.layers.0.mlp.experts.3.down_proj.weight_scale",
            1,
        ),
        ("llama-kv", "model.layers.0.self_attn.k_scale", 0),
        (
            "llama-kv-old-names",
            "model.layers.0.self_attn.v_proj.output_scale",
            0,
        ),
        ("llama-kv-head", "model.layers.0.self_attn.v_scale", 1),
    ] {
        for (value, printed) in bad {
            let dir = scale(from, "scale-value", name, |raw| raw.set(position, value));
            assert_refused!(
                dir,
                Error::ScaleValue { .. },
                format!(
                    "{name}: scale {printed} at position {position}; every scale must be positive and finite"
                )
            );
        }
    }
}

#[test]
fn dtypes() {
    let weight_scale = "model.layers.0.mlp.down_proj.weight_scale";
    for (from, name) in [
        ("llama-channel-token", weight_scale),
        ("llama-tensor-static", weight_scale),
        (
            "llama-tensor-static",
            "model.layers.0.mlp.down_proj.input_scale",
        ),
        ("llama-block-group", weight_scale),
        ("llama-kv", "model.layers.0.self_attn.k_scale"),
    ] {
        for dtype in [
            Dtype::U8,
            Dtype::F8_E8M0,
            Dtype::F8_E4M3,
            Dtype::F64,
            Dtype::I32,
        ] {
            // An F8 tensor that is no weight has a refusal of its own.
            if dtype == Dtype::F8_E4M3 && name.ends_with("k_scale") {
                continue;
            }
            let dir = scale(from, "scale-dtype", name, |raw| {
                let shape = raw.shape.clone();
                raw.recast(dtype, &shape);
            });
            assert_refused!(
                dir,
                Error::Dtype { .. },
                format!("{name}: expected dtype BF16, F16 or F32, found {dtype:?}")
            );
        }
    }
}
