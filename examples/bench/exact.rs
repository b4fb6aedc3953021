//! Some elements of a product again, in plain f64: a fast result counts only if it is right.

use anyhow::{Result, ensure};
use candle_core::{DType, IndexOp, Tensor};
use float8::F8E4M3;

/// Rows and output features that are looked at.
const SAMPLES: usize = 8;
/// How far an f32 sum may be from the exact one, relative to the sum of magnitudes: some hundred times what
/// accumulating in f32 leaves, and far below what one term among many thousand adds.
const TOLERANCE: f64 = 1e-5;

/// `y [M, N]` against `x [M, K]`, quantized for each token, times FP8 codes `[N, K]` with scales `[N, 1]`.
pub(crate) fn check_fp8(x: &Tensor, codes: &Tensor, scales: &Tensor, y: &Tensor) -> Result<()> {
    check(x, codes, y, |x, n| {
        let amax = x.iter().fold(0f64, |amax, x| amax.max(x.abs()));
        let x_scale = (amax / 448.) as f32;
        // The quotient that becomes a code is rounded to f32, as the definition of the op has it.
        let code = |x: &f64| F8E4M3::from_f32(*x as f32 / x_scale).to_f32();
        let codes = x.iter().map(|x| f64::from(code(x)));
        let scale = f64::from(scales.i((n, 0))?.to_scalar::<f32>()?);
        Ok((codes.collect(), scale * f64::from(x_scale)))
    })
}

/// `y [M, N]` against `x [M, K]` times a dense weight `[N, K]`.
pub(crate) fn check_dense(x: &Tensor, weight: &Tensor, y: &Tensor) -> Result<()> {
    check(x, weight, y, |x, _| Ok((x.to_vec(), 1.)))
}

/// `enter` says what becomes of a row of activations, and by what its product with output feature `n` is multiplied.
fn check(
    x: &Tensor,
    weight: &Tensor,
    y: &Tensor,
    enter: impl Fn(&[f64], usize) -> Result<(Vec<f64>, f64)>,
) -> Result<()> {
    let ((m, _), (n, _)) = (x.dims2()?, weight.dims2()?);
    ensure!(
        y.dims() == [m, n],
        "expected a product of shape [{m}, {n}], found {:?}",
        y.dims()
    );
    // Half a step between neighbours of the product's dtype, relative to it.
    let rounding = match y.dtype() {
        DType::BF16 => 2f64.powi(-8),
        DType::F16 => 2f64.powi(-11),
        _ => 2f64.powi(-24),
    };
    let row = |tensor: &Tensor, index: usize| -> Result<Vec<f64>> {
        // By way of f32: float8 0.7's conversion of an F8E4M3 to f64 does not end for all codes.
        let values = tensor.i(index)?.to_dtype(DType::F32)?;
        Ok(values.to_dtype(DType::F64)?.to_vec1()?)
    };
    for feature in samples(n) {
        let weights = row(weight, feature)?;
        for token in samples(m) {
            let (x, scale) = enter(&row(x, token)?, feature)?;
            let terms = x.iter().zip(&weights).map(|(x, w)| x * w * scale);
            let (sum, magnitude) = terms.fold((0., 0.), |(sum, magnitude), term| {
                (sum + term, magnitude + term.abs())
            });
            let found: f64 = y.i((token, feature))?.to_dtype(DType::F64)?.to_scalar()?;
            let bound = TOLERANCE * magnitude + rounding * sum.abs();
            // Written so that NaN fails.
            let fits = f64::abs(found - sum) <= bound;
            ensure!(
                fits,
                "the product in row {token}, feature {feature} is {found:e}, expected {sum:e} ± {bound:e}"
            );
        }
    }
    Ok(())
}

/// The first, the last and some between.
fn samples(len: usize) -> impl Iterator<Item = usize> {
    let count = SAMPLES.min(len);
    (0..count).map(move |i| i * (len - 1) / (count - 1).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn samples_reach_both_ends() {
        assert_eq!(samples(1).collect::<Vec<_>>(), [0]);
        assert_eq!(samples(3).collect::<Vec<_>>(), [0, 1, 2]);
        let many: Vec<_> = samples(1000).collect();
        assert_eq!((many.len(), many[0], many[7]), (SAMPLES, 0, 999));
    }

    #[test]
    fn a_term_too_many_is_noticed_and_so_is_nan() {
        let device = Device::Cpu;
        let x = Tensor::randn(0f32, 1., (4, 8192), &device).unwrap();
        let weight = Tensor::randn(0f32, 1., (9, 8192), &device).unwrap();
        let y = x.matmul(&weight.t().unwrap()).unwrap();
        check_dense(&x, &weight, &y).unwrap();
        // A term has a magnitude of 0.64 on average.
        let mut values = y.to_vec2::<f32>().unwrap();
        values[3][8] += 0.2;
        let wrong = Tensor::new(values.clone(), &device).unwrap();
        check_dense(&x, &weight, &wrong).unwrap_err();
        values[3][8] = f32::NAN;
        let nan = Tensor::new(values, &device).unwrap();
        check_dense(&x, &weight, &nan).unwrap_err();
        check_dense(&x, &weight, &y.i(..3).unwrap()).unwrap_err();
    }
}
