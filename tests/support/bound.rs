//! How far logits may be from their reference.

use std::path::Path;

use candle_compressed_tensors::{Checkpoint, QuantizerCompressedTensors};

use super::{Fixture, Mode, Reference, logits, max_difference, model, rows};

/// `[tokens, vocab]`.
pub fn reference_logits(reference: &Reference, mode: Mode) -> Vec<Vec<f64>> {
    rows(reference.get(&format!("logits.{}", mode.name())))
}

/// The largest absolute logit.
pub fn largest(logits: &[Vec<f64>]) -> f64 {
    logits
        .iter()
        .flatten()
        .fold(0., |max: f64, value| max.max(value.abs()))
}

/// Errors stay under a quarter of the smallest distance to another activation mode: one ulp of f32 before a quantizer can
/// turn a code, which is an eighth of a value, but not one mode into another.
///
/// Dequantized models are two f32 programs over the same weights: only the order of sums differs. The weights' own rounding
/// to BF16, which a wrong dequantization would miss, is 2⁻⁹.
pub fn bound(fixture: &Fixture, reference: &Reference, mode: Mode) -> f64 {
    let own = reference_logits(reference, mode);
    if mode == Mode::Dequantized {
        return 1e-4 * largest(&own);
    }
    let others = [Mode::AsCheckpoint, Mode::PerToken, Mode::Full].into_iter();
    let others = others.filter(|other| *other != mode && fixture.modes.contains(other));
    let distances = others.map(|other| max_difference(&own, &reference_logits(reference, other)));
    distances
        .filter(|distance| *distance > 0.)
        .fold(f64::INFINITY, f64::min)
        / 4.
}

/// The error against `fixture`'s reference when the model is loaded from `dir`, in units of the bound: above 1 is wrong.
pub fn excess(fixture: &Fixture, dir: &Path, mode: Mode) -> f64 {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let quantizer = QuantizerCompressedTensors::new(&checkpoint, mode.options()).unwrap();
    let reference = fixture.reference();
    let found = logits(&model(&checkpoint, &quantizer), &reference.ids("input_ids"));
    max_difference(&found, &reference_logits(&reference, mode)) / bound(fixture, &reference, mode)
}
