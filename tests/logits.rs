//! Every checkpoint end to end in f32: logits against transformers, and against the float64 script in each activation mode.

// Each test binary uses its part of the shared module.
#[allow(dead_code, unreachable_pub)]
mod support;

use candle_compressed_tensors::{LoadOptions, QuantizerCompressedTensors};
use support::{
    Mode,
    bound::{bound, excess, largest, reference_logits},
    changed, fixture, loadable, logits, max_difference, model,
};

#[test]
fn logits_agree_with_the_references_in_every_mode() {
    let mut compared = 0;
    for fixture in loadable() {
        let reference = fixture.reference();
        let ids = reference.ids("input_ids");
        for mode in fixture.modes.iter().copied() {
            let quantizer = fixture.quantizer(mode);
            assert_eq!(
                quantizer.use_fp8_kernel(),
                mode != Mode::Dequantized,
                "{}",
                fixture.name
            );
            let found = logits(&model(&fixture.checkpoint(), &quantizer), &ids);
            let expected = reference_logits(&reference, mode);
            let bound = bound(&fixture, &reference, mode);
            let error = max_difference(&found, &expected);
            println!(
                "{:32} {:14} error {error:.2e}, bound {bound:.2e}",
                fixture.name,
                mode.name()
            );
            assert!(
                error <= bound,
                "{} {}: {error} > {bound}",
                fixture.name,
                mode.name()
            );
            compared += 1;
        }
    }
    assert!(compared >= 120, "only {compared} logits were compared");
}

#[test]
fn the_bound_rejects_scales_swapped_between_experts() {
    for name in ["qwen3-moe-channel", "qwen3-moe-block", "mixtral-channel"] {
        let fixture = fixture(name);
        let swapped = changed(name, &format!("{name}-swapped"), |tensors, _| {
            let scales: Vec<String> = (tensors.keys())
                .filter(|key| key.contains(".experts.0.") && key.ends_with("weight_scale"))
                .cloned()
                .collect();
            assert!(!scales.is_empty());
            for first in scales {
                let second = first.replace(".experts.0.", ".experts.1.");
                let (a, b) = (tensors[&first].clone(), tensors[&second].clone());
                tensors.insert(first, b);
                tensors.insert(second, a);
            }
        });
        let excess = excess(&fixture, &swapped, Mode::Full);
        assert!(
            excess > 1.,
            "{name}: scales swapped between experts pass at {excess} times the bound"
        );
    }
}

#[test]
fn the_bound_rejects_the_wrong_mode_and_unscaled_caches() {
    for (name, loaded, expected) in [
        ("llama-tensor-static", Mode::PerToken, Mode::AsCheckpoint),
        ("llama-tensor-static", Mode::Full, Mode::AsCheckpoint),
        ("llama-block-group", Mode::PerToken, Mode::AsCheckpoint),
        (
            "llama-weight-only-channel",
            Mode::PerToken,
            Mode::AsCheckpoint,
        ),
    ] {
        let fixture = fixture(name);
        let reference = fixture.reference();
        let found = logits(
            &model(&fixture.checkpoint(), &fixture.quantizer(loaded)),
            &reference.ids("input_ids"),
        );
        let error = max_difference(&found, &reference_logits(&reference, expected));
        assert!(
            error > bound(&fixture, &reference, expected),
            "{name}: {loaded:?} passes for {expected:?}"
        );
    }
    let fixture = fixture("llama-kv");
    let unscaled = changed("llama-kv", "llama-kv-unscaled", |tensors, config| {
        tensors.retain(|name, _| !name.ends_with("k_scale") && !name.ends_with("v_scale"));
        config["quantization_config"]["kv_cache_scheme"] = serde_json::Value::Null;
    });
    let excess = excess(&fixture, &unscaled, Mode::Full);
    assert!(
        excess > 1.,
        "a cache in full precision passes at {excess} times the bound"
    );
}

#[test]
fn modules_to_not_convert_are_dense_and_right() {
    let fixture = fixture("llama-channel-token");
    let checkpoint = fixture.checkpoint();
    let all = fixture.quantizer(Mode::Full);
    let options = LoadOptions {
        modules_to_not_convert: vec!["mlp.down_proj".into()],
        ..Mode::Full.options()
    };
    let some = QuantizerCompressedTensors::new(&checkpoint, options).unwrap();
    let (all, some) = (model(&checkpoint, &all), model(&checkpoint, &some));
    let fp8 = |model: &candle_fp8_transformers::CausalLm| {
        model
            .linears()
            .filter(|(_, linear)| linear.is_fp8())
            .count()
    };
    let layers = all.config().num_hidden_layers;
    assert_eq!(fp8(&all) - fp8(&some), layers);
    let ids = fixture.reference().ids("input_ids");
    let (a, b) = (logits(&all, &ids), logits(&some, &ids));
    // The dense weights are rounded to BF16, 2⁻⁹ of each, before they become f32.
    assert!(max_difference(&a, &b) < 1e-2 * largest(&a));
}
