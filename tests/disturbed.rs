//! What tests on GPUs allow (`support/disturbed.rs`) is not what wrong models give.

// Each test binary uses its part of the shared module.
#[allow(dead_code, unreachable_pub)]
mod support;

use std::cell::Cell;

use candle_compressed_tensors::CtFp8Linear;
use candle_core::{Result, Tensor};
use support::{
    Fixture, Mode,
    bound::reference_logits,
    disturbed::{Distance, changed_logits, limit, of_f32, rescaled},
    loadable,
};

/// The halves of a linear's inputs exchanged: of an output projection, the heads.
fn exchanged(linear: CtFp8Linear) -> Result<CtFp8Linear> {
    let weight = linear.weight()?;
    let half = weight.dim(1)? / 2;
    let parts = [weight.narrow(1, half, half)?, weight.narrow(1, 0, half)?];
    let weight = Tensor::cat(&parts, 1)?;
    let (scale, bias) = (linear.weight_scale().clone(), linear.bias().cloned());
    CtFp8Linear::new(weight, scale, linear.layout(), bias, linear.activations())
}

/// How many times its limit a model's error is in which something is done to the output projections of attention.
/// `None` if none of them is in FP8.
fn excess(
    fixture: &Fixture,
    mode: Mode,
    change: impl Fn(CtFp8Linear) -> Result<CtFp8Linear>,
) -> Option<f64> {
    let reference = fixture.reference();
    let (ids, expected) = (
        reference.ids("input_ids"),
        reference_logits(&reference, mode),
    );
    let (checkpoint, quantizer) = (fixture.checkpoint(), fixture.quantizer(mode));
    let limit = match mode {
        Mode::Full | Mode::Dequantized => of_f32(&expected),
        Mode::AsCheckpoint | Mode::PerToken => limit(&checkpoint, &quantizer, &ids, &expected),
    };
    let changed = Cell::new(false);
    let found = changed_logits(&checkpoint, &quantizer, &ids, |name, linear| {
        if !name.ends_with("self_attn.o_proj") {
            return Ok(linear);
        }
        changed.set(true);
        change(linear)
    });
    let distance = Distance::between(&found, &expected);
    changed.get().then(|| distance.excess(limit))
}

/// Each checkpoint in some modes, and how many there were.
fn all(modes: &[Mode], check: impl Fn(&str, &Fixture, Mode) -> bool) -> usize {
    let mut count = 0;
    for fixture in loadable() {
        for mode in fixture.modes.iter().filter(|mode| modes.contains(mode)) {
            let what = format!("{} {}", fixture.name, mode.name());
            count += usize::from(check(&what, &fixture, *mode));
        }
    }
    count
}

#[test]
fn models_on_the_cpu_are_far_below_the_limits() {
    let count = all(
        &[Mode::AsCheckpoint, Mode::PerToken, Mode::Full],
        |what, fixture, mode| {
            let excess = excess(fixture, mode, Ok);
            println!("{what}: {excess:?}");
            assert!(
                excess.is_none_or(|excess| excess < 0.6),
                "{what}: {excess:?}"
            );
            excess.is_some()
        },
    );
    assert!(count > 60, "{count}");
}

#[test]
fn wrong_heads_exceed_them() {
    let count = all(
        &[Mode::AsCheckpoint, Mode::PerToken],
        |what, fixture, mode| {
            let heads = excess(fixture, mode, exchanged);
            let scale = excess(fixture, mode, |linear| rescaled(linear, |_| 1.5));
            println!("{what}: heads exchanged {heads:?}, scales times 1.5 {scale:?}");
            for excess in [heads, scale].into_iter().flatten() {
                assert!(excess > 1.2, "{what}: {excess}");
            }
            heads.is_some()
        },
    );
    assert!(count > 40, "{count}");
}

/// Codes that turn hide this from quantized activations; the modes without them have the same weights and scales.
#[test]
fn scales_one_percent_off_exceed_those_of_full_precision() {
    let count = all(&[Mode::Full], |what, fixture, mode| {
        let excess = excess(fixture, mode, |linear| rescaled(linear, |_| 1.01));
        println!("{what}: {excess:?}");
        assert!(
            excess.is_none_or(|excess| excess > 5.0),
            "{what}: {excess:?}"
        );
        excess.is_some()
    });
    assert!(count > 20, "{count}");
}
