//! SiLU · up: near the oracle, and quantizing at once as quantizing afterwards, bit by bit.

use candle_kernels_fp8::cuda::{self, Float, Output, SiluMul};

use crate::oracle;
use crate::oracle::cases::Random;
use crate::rows::{
    Codes, FLOATS, Mode, Rows, Values, assert_same, on_cpu, oracle_float, round, widen,
};
use crate::support_cuda::Device;
use crate::{lengths, row_counts};

/// Values between `-range` and `range`.
fn uniform(count: usize, range: f32, float: Float, seed: u64) -> Vec<f32> {
    let mut random = Random(seed);
    (0..count)
        .map(|_| round(random.signed() * range, float))
        .collect()
}

/// Runs with both operands in one matrix `[m, 2 k]`, or each in its own.
fn run(
    device: &Device,
    (m, k): (usize, usize),
    float: Float,
    (gate, up): (&[f32], &[f32]),
    merged: bool,
    out: Output,
) {
    let (first, second, stride, offset) = if merged {
        let rows = gate.chunks(k).zip(up.chunks(k));
        let both: Vec<f32> = rows.flat_map(|(gate, up)| [gate, up].concat()).collect();
        let both = Rows::new(device, &both, 2 * k, 2 * k, float);
        (both, None, 2 * k, k * float.size())
    } else {
        let gate = Rows::new(device, gate, k, k, float);
        (gate, Some(Rows::new(device, up, k, k, float)), k, 0)
    };
    let args = SiluMul {
        m,
        k,
        gate: first.address(),
        gate_stride: stride,
        up: second
            .as_ref()
            .map_or(first.address() + offset as u64, Rows::address),
        up_stride: stride,
        float,
        out,
        dependent: !merged,
    };
    // SAFETY: the memory is as large as the sizes say.
    unsafe { cuda::silu_mul(&device.stream, &args) }.unwrap();
    first.assert_untouched(device);
}

fn check(device: &Device, (m, k): (usize, usize), float: Float, merged: bool) {
    let what = format!("{float:?} [{m}, {k}], merged: {merged}");
    let gate = uniform(m * k, 25.0, float, k as u64);
    let up = uniform(m * k, 3.0, float, (k + 1) as u64);
    let operands = (&gate[..], &up[..]);
    let values = Values::new(device, m, k, k, float);
    run(device, (m, k), float, operands, merged, values.output());
    let found = values.get(device);
    let expected = oracle::token::silu_mul(&widen(&gate), &widen(&up));
    check_values(&found, &expected, float, &what);
    for mode in [Mode::Token, Mode::Group(128), Mode::Static(0.05)] {
        let codes = Codes::new(device, m, k, k.next_multiple_of(16), mode);
        run(device, (m, k), float, operands, merged, codes.output());
        let expected = on_cpu(&found, k, mode);
        codes
            .get(device)
            .assert_is(&expected, &found, &format!("{mode:?} of {what}"));
    }
}

/// 3 ulp of the exponential, 2 of the reciprocal's approximation, a rounding each of the sum and three products: below
/// 16 · 2^-24. What is below 2^-119 may be zero.
fn check_values(found: &[f32], expected: &[f64], float: Float, what: &str) {
    let float = oracle_float(float);
    let unit = if float == oracle::Float::F32 {
        0.0
    } else {
        float.unit_roundoff()
    };
    let relative = unit + 16.0 * 2f64.powi(-24);
    for (i, (&found, expected)) in found.iter().zip(expected).enumerate() {
        let error = (f64::from(found) - expected).abs();
        let bound = expected.abs() * relative + float.min_step() + 2f64.powi(-118);
        assert!(
            error <= bound,
            "{what}: {i} is {found:e}, not {expected:e} ± {bound:e}"
        );
    }
}

#[test]
fn every_shape() {
    let Some(device) = Device::get() else { return };
    for k in lengths() {
        for m in row_counts(k) {
            check(&device, (m, k), FLOATS[(k + m) % 3], (k + m / 3) % 2 == 0);
        }
    }
}

#[test]
fn every_type_in_every_kernel() {
    let Some(device) = Device::get() else { return };
    for float in FLOATS {
        for merged in [false, true] {
            for (m, k) in [
                (1, 256),
                (1, 14336),
                (20, 8192),
                (100, 2048),
                (400, 8192),
                (5000, 96),
            ] {
                check(&device, (m, k), float, merged);
            }
        }
    }
}

#[test]
fn every_gate() {
    let Some(device) = Device::get() else { return };
    for float in [Float::Bf16, Float::F16] {
        let value = |bits: u16| match float {
            Float::Bf16 => half::bf16::from_bits(bits).to_f32(),
            _ => half::f16::from_bits(bits).to_f32(),
        };
        let gate: Vec<f32> = (0..=u16::MAX)
            .map(value)
            .filter(|x| x.is_finite())
            .collect();
        let (k, up) = (gate.len(), vec![1.0; gate.len()]);
        let values = Values::new(&device, 1, k, k, float);
        run(&device, (1, k), float, (&gate, &up), false, values.output());
        let mut expected = oracle::token::silu_mul(&widen(&gate), &widen(&up));
        // The oracle multiplies a number with an exponential that is 0 in f64 only where the product is 0 in f32, too.
        expected
            .iter_mut()
            .for_each(|value| *value = if value.is_nan() { 0.0 } else { *value });
        check_values(
            &values.get(&device),
            &expected,
            float,
            &format!("{float:?}"),
        );
    }
}

#[test]
fn far_from_zero() {
    let Some(device) = Device::get() else { return };
    let gate = [
        100.0,
        1e30,
        f32::INFINITY,
        -100.0,
        -1e30,
        f32::NAN,
        f32::NEG_INFINITY,
        -0.0,
    ];
    let values = Values::new(&device, 1, 8, 8, Float::F32);
    run(
        &device,
        (1, 8),
        Float::F32,
        (&gate, &[2.0; 8]),
        false,
        values.output(),
    );
    let found = values.get(&device);
    assert!((found[0] - 200.0).abs() < 1e-4 && (found[1] / 2e30 - 1.0).abs() < 1e-6);
    let expected = [f32::INFINITY, -0.0, -0.0, f32::NAN, f32::NAN, -0.0];
    assert_same(&found[2..], &expected, "silu(gate) · 2");
}
