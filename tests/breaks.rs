//! Where the transformers integration breaks, ours works. One test a line of its known failures.

// Each test binary uses its part of the shared module.
#[allow(dead_code, unreachable_pub)]
mod support;

use candle_compressed_tensors::{Checkpoint, CtLinear, Error, Plan, SaveOptions, save};
use support::{
    Mode,
    bound::{bound, excess, reference_logits},
    changed, dir, fixture, logits, max_difference, model, raw_tensors, scratch,
};

/// The checkpoint loads in this mode, and agrees with its reference.
fn agrees(name: &str, mode: Mode) {
    let excess = excess(&fixture(name), &dir(name), mode);
    assert!(excess <= 1., "{name} {mode:?}: {excess} times the bound");
}

/// The linears of the model in this mode: FP8, dense.
fn linears(name: &str, mode: Mode) -> (usize, usize) {
    let fixture = fixture(name);
    let model = model(&fixture.checkpoint(), &fixture.quantizer(mode));
    let fp8 = model
        .linears()
        .filter(|(_, linear)| linear.is_fp8())
        .count();
    (fp8, model.linears().count() - fp8)
}

#[test]
fn dense_block_models_run_on_fp8_weights() {
    for name in [
        "llama-block-group",
        "llama-block-token",
        "llama-block-tensor",
        "qwen3-block-fp8",
    ] {
        agrees(name, Mode::AsCheckpoint);
        let (fp8, dense) = linears(name, Mode::AsCheckpoint);
        assert!(fp8 >= 7 && dense <= 1, "{name}: {fp8} FP8, {dense} dense");
    }
}

#[test]
fn mxfp8_is_refused_by_name_before_a_model_is_built() {
    let checkpoint = fixture("llama-mxfp8").checkpoint();
    for mode in Mode::ALL {
        let plan = Plan::new(&checkpoint, &mode.options());
        let text = plan.problems()[0].to_string();
        assert!(matches!(plan.problems()[0], Error::Config(_)), "{text}");
        assert!(
            text.contains("module `model.layers.0.mlp.down_proj`"),
            "{text}"
        );
        assert!(text.contains("MXFP8"), "{text}");
    }
}

#[test]
fn block_experts_load_in_every_mode() {
    for name in ["qwen3-moe-block", "mixtral-block", "qwen3-moe-block-fp8"] {
        for mode in Mode::ALL {
            agrees(name, mode);
        }
    }
}

#[test]
fn an_fp8_lm_head_is_scaled() {
    let name = "llama-lm-head";
    let lm_head = fixture(name);
    let quantizer = lm_head.quantizer(Mode::AsCheckpoint);
    let model = model(quantizer.checkpoint(), &quantizer);
    let is_head = |(name, linear): (String, &CtLinear)| name == "lm_head" && linear.is_fp8();
    assert!(model.linears().any(is_head), "lm_head is not FP8");
    agrees(name, Mode::AsCheckpoint);
    // What a head of raw codes would give is far outside of the bound.
    let raw = changed(name, "breaks-lm-head-raw", |tensors, _| {
        tensors.get_mut("lm_head.weight_scale").unwrap().fill(1.);
    });
    let excess = excess(&lm_head, &raw, Mode::AsCheckpoint);
    assert!(excess > 100., "raw codes pass at {excess} times the bound");
}

#[test]
fn a_frozen_checkpoint_is_read_as_what_its_tensors_are() {
    let name = "llama-frozen";
    let config = fixture(name).checkpoint().config().to_string();
    assert!(
        config.contains(r#""quantization_status":"frozen""#),
        "{config}"
    );
    agrees(name, Mode::AsCheckpoint);
    agrees(name, Mode::Dequantized);
    assert!(linears(name, Mode::AsCheckpoint).0 > 0);
    assert_eq!(linears(name, Mode::Dequantized).0, 0);
}

#[test]
fn attention_runs_over_a_quantized_cache_with_fp8_linears() {
    for name in ["llama-kv", "llama-kv-old-names", "llama-kv-head"] {
        agrees(name, Mode::AsCheckpoint);
        assert!(linears(name, Mode::AsCheckpoint).0 > 0);
    }
}

#[test]
fn channel_beside_block_dequantizes() {
    let name = "llama-channel-and-block";
    agrees(name, Mode::Dequantized);
    agrees(name, Mode::AsCheckpoint);
}

#[test]
fn weight_only_models_do_not_quantize_their_inputs() {
    for name in ["llama-weight-only-channel", "llama-weight-only-tensor"] {
        let weight_only = fixture(name);
        let reference = weight_only.reference();
        let model = model(
            &weight_only.checkpoint(),
            &weight_only.quantizer(Mode::AsCheckpoint),
        );
        for (name, linear) in model.linears() {
            if let CtLinear::Fp8(linear) = linear {
                assert!(linear.activations().is_none(), "{name}");
            }
        }
        let found = logits(&model, &reference.ids("input_ids"));
        let away = |mode| max_difference(&found, &reference_logits(&reference, mode));
        assert!(away(Mode::Full) <= bound(&weight_only, &reference, Mode::Full));
        assert!(away(Mode::PerToken) > bound(&weight_only, &reference, Mode::PerToken));
    }
}

#[test]
fn saving_keeps_input_scale_and_the_saved_model_uses_it() {
    for name in ["llama-tensor-static", "qwen3-moe-tensor-static"] {
        let original = fixture(name);
        let quantizer = original.quantizer(Mode::AsCheckpoint);
        let state = model(quantizer.checkpoint(), &quantizer).state();
        let saved = scratch(&format!("breaks-{name}"));
        save(&quantizer, &state, &saved, &SaveOptions::default()).unwrap();

        let stored = raw_tensors(&dir(name));
        let written = raw_tensors(&saved);
        let scales: Vec<_> = (stored.iter())
            .filter(|(name, _)| name.ends_with("input_scale"))
            .collect();
        assert!(!scales.is_empty(), "{name} has no input_scale");
        for (tensor, scale) in scales {
            assert_eq!(written.get(tensor), Some(scale), "{name}: {tensor}");
        }
        assert_eq!(
            Checkpoint::open(&saved).unwrap().config(),
            quantizer.checkpoint().config()
        );
        let excess = excess(&original, &saved, Mode::AsCheckpoint);
        assert!(excess <= 1., "{name}, saved: {excess} times the bound");
    }
}
