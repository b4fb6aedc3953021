//! Every checkpoint end to end in f32: logits against transformers, and against the float64 script in each activation mode.

// Each test binary uses its part of the shared module.
#[allow(dead_code, unreachable_pub)]
mod support;

use candle_compressed_tensors::{Checkpoint, LoadOptions, QuantizerCompressedTensors};
use support::{
    Fixture, Mode, Reference, changed, fixture, loadable, logits, max_difference, model, rows,
};

fn reference_logits(reference: &Reference, mode: Mode) -> Vec<Vec<f64>> {
    rows(reference.get(&format!("logits.{}", mode.name())))
}

/// Errors stay under a quarter of the smallest distance to another activation mode: one ulp of f32 before a quantizer can
/// turn a code, which is an eighth of a value, but not one mode into another.
fn bound(fixture: &Fixture, reference: &Reference, mode: Mode) -> f64 {
    let own = reference_logits(reference, mode);
    let others = [Mode::AsCheckpoint, Mode::PerToken, Mode::Full].into_iter();
    let others = others.filter(|other| *other != mode && fixture.modes.contains(other));
    let distances = others.map(|other| max_difference(&own, &reference_logits(reference, other)));
    distances
        .filter(|distance| *distance > 0.)
        .fold(f64::INFINITY, f64::min)
        / 4.
}

fn largest(logits: &[Vec<f64>]) -> f64 {
    logits
        .iter()
        .flatten()
        .fold(0., |max: f64, value| max.max(value.abs()))
}

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
            let bound = match mode {
                // Two f32 programs over the same weights: only the order of sums differs. The weights' own rounding to
                // BF16, which a wrong dequantization would miss, is 2⁻⁹.
                Mode::Dequantized => 1e-4 * largest(&expected),
                _ => bound(&fixture, &reference, mode),
            };
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

/// The error of `fixture`'s reference when the model is loaded from `dir` instead, in units of the bound.
fn excess(fixture: &Fixture, dir: &std::path::Path, mode: Mode) -> f64 {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let quantizer = QuantizerCompressedTensors::new(&checkpoint, mode.options()).unwrap();
    let reference = fixture.reference();
    let found = logits(&model(&checkpoint, &quantizer), &reference.ids("input_ids"));
    max_difference(&found, &reference_logits(&reference, mode)) / bound(fixture, &reference, mode)
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
