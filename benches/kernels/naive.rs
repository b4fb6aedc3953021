//! Data, and in plain f64 what the oracle of FP8 arithmetic does not say.

/// A generator of numbers, the same in every run (PCG's multiplier and increment).
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u32 {
        self.0 = (self.0)
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (self.0 >> 32) as u32
    }
}

/// Between -1 and 1.
pub(crate) fn values(len: usize) -> Vec<f32> {
    let mut random = Random(len as u64);
    let value = |_| random.bits() as f32 / 2f32.powi(31) - 1.;
    (0..len).map(value).collect()
}

/// E4M3 codes, none of them NaN.
pub(crate) fn codes(len: usize) -> Vec<u8> {
    let mut random = Random(len as u64);
    let code = |_| match random.bits() as u8 {
        nan if nan & 0x7f == 0x7f => nan ^ 1,
        code => code,
    };
    (0..len).map(code).collect()
}

pub(crate) fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&value| value.into()).collect()
}

/// Asserts that every value is within `tolerance` of the largest magnitude. NaN is not.
#[track_caller]
pub(crate) fn assert_close(found: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len());
    let largest = expected
        .iter()
        .fold(0f64, |largest, v| largest.max(v.abs()));
    for (index, (&found, expected)) in found.iter().zip(expected).enumerate() {
        let near = (f64::from(found) - expected).abs() <= tolerance * largest;
        assert!(near, "value {index} is {found:e}, expected {expected:e}");
    }
}

/// Asserts that `y` is `x · wᵀ`, rows of `k`, up to `k + 4` roundings to f32 of the sum of magnitudes.
#[track_caller]
pub(crate) fn check_product(x: &[f64], w: &[f64], k: usize, y: &[f64]) {
    let rows = x.chunks_exact(k);
    let pairs = rows.flat_map(|x| w.chunks_exact(k).map(move |w| x.iter().zip(w)));
    assert_eq!(y.len(), x.len() / k * (w.len() / k));
    for (index, (terms, found)) in pairs.zip(y).enumerate() {
        let (sum, magnitude) = terms.fold((0., 0.), |(sum, magnitude), (x, w)| {
            (sum + x * w, magnitude + (x * w).abs())
        });
        let bound = (k as f64 + 4.) * 2f64.powi(-24) * magnitude;
        let near = (found - sum).abs() <= bound;
        assert!(
            near,
            "product {index} is {found:e}, expected {sum:e} ± {bound:e}"
        );
    }
}

/// One query `[D]` over all keys and values `[T, D]`.
pub(crate) fn attend(q: &[f64], keys: &[f64], values: &[f64], scale: f64) -> Vec<f64> {
    let dot = |key: &[f64]| q.iter().zip(key).map(|(q, k)| q * k).sum::<f64>();
    let weights = keys
        .chunks_exact(q.len())
        .map(|key| (dot(key) * scale).exp());
    let mut total = 0.;
    let mut sums = vec![0.; q.len()];
    for (weight, value) in weights.zip(values.chunks_exact(q.len())) {
        total += weight;
        for (sum, value) in sums.iter_mut().zip(value) {
            *sum += weight * value;
        }
    }
    sums.iter().map(|sum| sum / total).collect()
}

/// One row.
pub(crate) fn rms_norm(x: &[f64], weight: &[f64], eps: f64) -> Vec<f64> {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    let root = (mean + eps).sqrt();
    x.iter().zip(weight).map(|(x, w)| x / root * w).collect()
}
