//! Norms: within a bound of the oracle, and quantized at once as they are quantized afterwards.

use candle_kernels_fp8::metal::{self, Float, Output, Residual, RmsNorm};

use crate::emulator::{Emulator, Memory};
use crate::oracle;
use crate::rows::{Codes, row_counts, values_of};
use crate::values::{
    FLOATS, Mode, POISON, activations, apart, assert_same, lengths, oracle_float, round, to_bytes,
    widen,
};

fn norm(device: &Emulator, (m, k): (usize, usize), float: Float, residual: bool) {
    let what = format!("norm of {float:?} [{m}, {k}], residual {residual}");
    let (size, stride) = (float.size(), k + m % 5);
    let room = || device.upload(&vec![POISON; m * stride * size]);
    let upload =
        |values: &[f32]| device.upload(&apart(&to_bytes(values, float), k * size, stride * size));
    let [x, other] = [1, 2].map(|seed| activations(m, k, float, (m * 1009 + k + seed) as u64));
    let weight: Vec<f32> = activations(1, k, float, 3)
        .iter()
        .map(|w| round(w + 1.0, float))
        .collect();
    let sums: Vec<f32> = match residual {
        true => x
            .iter()
            .zip(&other)
            .map(|(x, other)| round(x + other, float))
            .collect(),
        false => x.clone(),
    };
    let [x_memory, other_memory, weight_memory] = [upload(&x), upload(&other), upload(&weight)];
    let (sum, out) = (room(), room());
    let run = |out: Output<'_, Memory>| {
        let args = RmsNorm {
            m,
            k,
            x: x_memory.slice(),
            row_stride: stride,
            residual: residual.then(|| Residual {
                values: other_memory.slice(),
                stride,
                sum: sum.slice(),
                sum_stride: stride,
            }),
            weight: weight_memory.slice(),
            eps: 1e-5,
            float,
            out,
        };
        metal::rms_norm(device, &args).unwrap();
    };
    run(Output::Values {
        values: out.slice(),
        stride,
    });
    if residual {
        assert_same(&values_of(device, &sum, (k, stride), float), &sums, &what);
    }
    let found = values_of(device, &out, (k, stride), float);
    let type_of = oracle_float(float);
    let expected = oracle::token::rms_norm(&widen(&sums), &widen(&weight), 1e-5f32.into(), type_of);
    // Sums of a thread, then of its SIMD group, then of the group, halved by the root; the quotient may tip over to its
    // neighbor.
    let (unit, tips) = (
        type_of.unit_roundoff(),
        if float == Float::F32 { 1.0 } else { 3.0 },
    );
    // Few do: most results are the oracle's, rounded, which they are not where a rounding is left out or comes twice.
    let others = found.iter().zip(&expected);
    let others = others.filter(|(found, expected)| f64::from(**found) != type_of.round(**expected));
    assert!(
        float == Float::F32 || others.clone().count() <= 2 + found.len() / 50,
        "{what}: {} of {} are another value",
        others.count(),
        found.len()
    );
    let relative = tips * unit + (k as f64 / 256.0 + 16.0) * 2f64.powi(-24);
    for (i, (&found, expected)) in found.iter().zip(&expected).enumerate() {
        let bound = expected.abs() * relative + 2.0 * type_of.min_step();
        let error = (f64::from(found) - expected).abs();
        assert!(
            error <= bound,
            "{what}: {i} is {found:e}, not {expected:e} ± {bound:e}"
        );
    }
    for mode in [
        Mode::Token,
        Mode::Group(128),
        Mode::Group(7),
        Mode::Static(0.05),
    ] {
        let codes = Codes::new(device, m, k, mode);
        run(codes.output());
        codes.check(&found, &what);
    }
    device.clear();
}

#[test]
fn norms() {
    let Some(device) = Emulator::get() else {
        return;
    };
    for k in lengths() {
        for &m in row_counts(k) {
            norm(&device, (m, k), FLOATS[(k + m) % 3], (k + m / 3) % 2 == 0);
        }
    }
    device.assert_all_launched("rms_norm_");
}
