//! Inner activations: the bits of the CPU, within a bound of the oracle, and quantized at once as they are quantized
//! afterwards.

use candle_kernels_fp8::cpu::{self, InstructionSet};
use candle_kernels_fp8::metal::{self, Float, Output, SiluMul};
use half::{bf16, f16};

use crate::emulator::{Emulator, Memory};
use crate::oracle::{self, cases::Random};
use crate::rows::{Codes, row_counts, values_of};
use crate::values::{
    FLOATS, Mode, POISON, assert_same, lengths, oracle_float, round, to_bytes, widen,
};

fn silu_mul_on_cpu(gate: &[f32], up: &[f32], float: Float) -> Vec<f32> {
    fn run<T: cpu::Element>(gate: &[f32], up: &[f32]) -> Vec<f32> {
        let [gate, up] = [gate, up].map(|x| x.iter().map(|&x| T::from_f32(x)).collect::<Vec<T>>());
        let mut out = Vec::new();
        cpu::silu_mul(InstructionSet::best(), &gate, &up, &mut out);
        out.into_iter().map(T::to_f32).collect()
    }
    match float {
        Float::Bf16 => run::<bf16>(gate, up),
        Float::F16 => run::<f16>(gate, up),
        Float::F32 => run::<f32>(gate, up),
    }
}

/// With both operands in one matrix `[m, 2 k]`, as one linear gives them.
fn silu(device: &Emulator, gate: &[f32], up: &[f32], k: usize, float: Float, modes: &[Mode]) {
    let m = gate.len() / k;
    let what = format!("silu_mul of {float:?} [{m}, {k}]");
    let rows = gate.chunks(k).zip(up.chunks(k));
    let both: Vec<f32> = rows.flat_map(|(gate, up)| [gate, up].concat()).collect();
    let memory = device.upload(&to_bytes(&both, float));
    let stride = k + m % 3;
    let out = device.upload(&vec![POISON; m * stride * float.size()]);
    let run = |out: Output<'_, Memory>| {
        let args = SiluMul {
            m,
            k,
            gate: memory.slice(),
            gate_stride: 2 * k,
            up: memory.slice().after(k * float.size()),
            up_stride: 2 * k,
            float,
            out,
        };
        metal::silu_mul(device, &args).unwrap();
    };
    run(Output::Values {
        values: out.slice(),
        stride,
    });
    let found = values_of(device, &out, (k, stride), float);
    assert_same(&found, &silu_mul_on_cpu(gate, up, float), &what);
    let expected = oracle::token::silu_mul(&widen(gate), &widen(up));
    let type_of = oracle_float(float);
    // Seven roundings in f32, the exponential's included, and the last.
    let relative = type_of.unit_roundoff() + 7.0 * 2f64.powi(-24);
    for (i, (&found, expected)) in found.iter().zip(expected).enumerate() {
        let error = (f64::from(found) - expected).abs();
        let fits = error <= expected.abs() * relative + type_of.min_step() + 1e-9;
        // Infinity, or NaN, of what is not finite.
        assert!(
            fits || !gate[i].is_finite(),
            "{what}: {i} is {found:e}, not {expected:e}"
        );
    }
    for &mode in modes {
        let codes = Codes::new(device, m, k, mode);
        run(codes.output());
        codes.check(&found, &what);
    }
    device.clear();
}

#[test]
fn inner_activations() {
    let Some(device) = Emulator::get() else {
        return;
    };
    let modes = [
        Mode::Token,
        Mode::Group(128),
        Mode::Group(7),
        Mode::Static(0.05),
    ];
    for k in lengths() {
        for &m in row_counts(k) {
            let float = FLOATS[(k + m) % 3];
            let mut random = Random((m * 1009 + k) as u64);
            let mut uniform = |range: f32| -> Vec<f32> {
                (0..m * k)
                    .map(|_| round(random.signed() * range, float))
                    .collect()
            };
            silu(&device, &uniform(25.0), &uniform(3.0), k, float, &modes);
        }
    }
    device.assert_all_launched("silu_mul_");
}

#[test]
fn every_gate() {
    let Some(device) = Emulator::get() else {
        return;
    };
    for float in [Float::Bf16, Float::F16] {
        let value = |bits: u16| match float {
            Float::Bf16 => bf16::from_bits(bits).to_f32(),
            _ => f16::from_bits(bits).to_f32(),
        };
        // What is subnormal may be taken for zero, and so may its products.
        let all = (0..=u16::MAX).map(value);
        let gate: Vec<f32> = all
            .filter(|x| *x == 0.0 || x.is_nan() || x.abs() >= 2.0 * f32::MIN_POSITIVE)
            .collect();
        let up = vec![1.0; gate.len()];
        silu(&device, &gate, &up, gate.len(), float, &[]);
    }
}
