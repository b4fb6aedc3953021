//! What tests on GPUs allow (`support/disturbed.rs`) is not what wrong models give.

// Each test binary uses its part of the shared module.
#[allow(dead_code, unreachable_pub)]
mod support;

use candle_compressed_tensors::CtFp8Linear;
use candle_core::Tensor;
use support::{
    Mode,
    bound::reference_logits,
    disturbed::{Distance, changed_logits, limit, of_f32, rescaled},
    loadable,
};

/// Models in which a linear of the last layer is wrong.
fn wrong(what: &str, name: &str, linear: CtFp8Linear) -> candle_core::Result<CtFp8Linear> {
    let of = |part: &str| name.ends_with(&format!("layers.1.{part}"));
    match what {
        "heads" if of("self_attn.o_proj") => {
            // The outputs of heads, in another order.
            let weight = linear.weight()?;
            let half = weight.dim(1)? / 2;
            let parts = [weight.narrow(1, half, half)?, weight.narrow(1, 0, half)?];
            let weight = Tensor::cat(&parts, 1)?;
            let (scale, bias) = (linear.weight_scale().clone(), linear.bias().cloned());
            CtFp8Linear::new(weight, scale, linear.layout(), bias, linear.activations())
        }
        "no o" if of("self_attn.o_proj") => rescaled(linear, |_| 1e-6),
        "o 1.5" if of("self_attn.o_proj") => rescaled(linear, |_| 1.5),
        "v 1.5" if of("self_attn.v_proj") => rescaled(linear, |_| 1.5),
        "down 1.5" if of("mlp.down_proj") => rescaled(linear, |_| 1.5),
        "down 1.1" if of("mlp.down_proj") => rescaled(linear, |_| 1.1),
        "q 1.5" if of("self_attn.q_proj") => rescaled(linear, |_| 1.5),
        "down 1%" if of("mlp.down_proj") => rescaled(linear, |_| 1.01),
        "q 1%" if of("self_attn.q_proj") => rescaled(linear, |_| 1.01),
        _ => Ok(linear),
    }
}

#[test]
fn explore() {
    for fixture in loadable() {
        let reference = fixture.reference();
        let ids = reference.ids("input_ids");
        for mode in fixture.modes.iter().copied() {
            let expected = reference_logits(&reference, mode);
            let limit = match mode {
                Mode::Dequantized => continue,
                Mode::Full => of_f32(&expected),
                _ => limit(
                    &fixture.checkpoint(),
                    &fixture.quantizer(mode),
                    &ids,
                    &expected,
                ),
            };
            let mut line = format!(
                "{:28} {:13} {:.3} {:.4}",
                fixture.name,
                mode.name(),
                limit.largest,
                limit.root_mean_square
            );
            for other in fixture
                .modes
                .iter()
                .copied()
                .filter(|other| *other != mode && *other != Mode::Dequantized)
            {
                let distance = Distance::between(&reference_logits(&reference, other), &expected);
                line += &format!(
                    " | {} {:.2} {:.2}",
                    other.name(),
                    distance.largest / limit.largest,
                    distance.root_mean_square / limit.root_mean_square
                );
            }
            for what in [
                "heads", "no o", "o 1.5", "v 1.5", "down 1.5", "down 1.1", "q 1.5", "down 1%",
                "q 1%",
            ] {
                let found = changed_logits(
                    &fixture.checkpoint(),
                    &fixture.quantizer(mode),
                    &ids,
                    |name, linear| wrong(what, name, linear),
                );
                let distance = Distance::between(&found, &expected);
                line += &format!(
                    " | {what} {:.2} {:.2}",
                    distance.largest / limit.largest,
                    distance.root_mean_square / limit.root_mean_square
                );
            }
            println!("{line}");
        }
    }
}
