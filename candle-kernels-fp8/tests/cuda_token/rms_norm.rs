//! RMS norm: near the oracle and the CPU, and quantizing at once as quantizing afterwards, bit by bit.

use candle_kernels_fp8::cpu;
use candle_kernels_fp8::cuda::{self, Float, Output, Residual, RmsNorm};

use crate::oracle;
use crate::rows::{
    Codes, FLOATS, Mode, Rows, Values, activations, assert_same, on_cpu, oracle_float, round, widen,
};
use crate::support_cuda::Device;
use crate::{lengths, row_counts};

const EPS: f32 = 1e-5;

/// A norm's inputs, on both sides.
struct Problem {
    m: usize,
    k: usize,
    float: Float,
    x: Vec<f32>,
    residual: Option<Vec<f32>>,
    weight: Vec<f32>,
    /// Elements from row to row, everywhere.
    stride: usize,
}

impl Problem {
    fn new((m, k): (usize, usize), stride: usize, float: Float, residual: bool) -> Self {
        let seed = (m * 100_003 + k) as u64;
        let weight = activations(1, k, float, seed + 1);
        Self {
            m,
            k,
            float,
            x: activations(m, k, float, seed),
            residual: residual.then(|| activations(m, k, float, seed + 2)),
            weight: weight.iter().map(|&w| round(w + 1.0, float)).collect(),
            stride,
        }
    }

    /// What is normalized.
    fn sums(&self) -> Vec<f32> {
        match &self.residual {
            None => self.x.clone(),
            Some(residual) => (self.x.iter().zip(residual))
                .map(|(x, residual)| round(x + residual, self.float))
                .collect(),
        }
    }

    /// Runs on the device and checks the new residual. In place, the sum replaces the residual.
    fn run(&self, device: &Device, out: Output, in_place: bool, dependent: bool) {
        let &Self {
            m,
            k,
            float,
            stride,
            ..
        } = self;
        let x = Rows::new(device, &self.x, k, stride, float);
        let residual = self.residual.as_ref();
        let residual = residual.map(|residual| Rows::new(device, residual, k, stride, float));
        let weight = Rows::new(device, &self.weight, k, k, float);
        let sum = Values::new(device, m, k, stride, float);
        let args = RmsNorm {
            m,
            k,
            x: x.address(),
            row_stride: stride,
            residual: residual.as_ref().map(|residual| Residual {
                values: residual.address(),
                stride,
                sum: if in_place {
                    residual.address()
                } else {
                    sum.address()
                },
                sum_stride: stride,
            }),
            weight: weight.address(),
            eps: EPS,
            float,
            out,
            dependent,
        };
        // SAFETY: the memory is as large as the sizes say.
        unsafe { cuda::rms_norm(&device.stream, &args) }.unwrap();
        x.assert_untouched(device);
        if residual.is_some() && !in_place {
            let found = sum.get(device);
            assert_same(
                &found,
                &self.sums(),
                &format!("sums of {float:?} [{m}, {k}]"),
            );
        }
    }

    fn check(&self, device: &Device) {
        let &Self {
            m,
            k,
            float,
            stride,
            ..
        } = self;
        let what = format!(
            "{float:?} [{m}, {k}], stride {stride}, residual: {}",
            self.residual.is_some()
        );
        let values = Values::new(device, m, k, stride, float);
        self.run(device, values.output(), false, false);
        let normed = values.get(device);
        self.check_values(&normed, &what);
        let in_place = Values::new(device, m, k, stride, float);
        self.run(device, in_place.output(), true, true);
        assert_same(&in_place.get(device), &normed, &what);
        for mode in [Mode::Token, Mode::Group(128), Mode::Static(0.007)] {
            // The codes of rows start where a kernel for vectors can write them exactly where the rows do.
            let codes = Codes::new(device, m, k, stride.next_multiple_of(16), mode);
            self.run(device, codes.output(), false, false);
            let expected = on_cpu(&normed, k, mode);
            codes
                .get(device)
                .assert_is(&expected, &normed, &format!("{mode:?} of {what}"));
        }
    }

    fn check_values(&self, found: &[f32], what: &str) {
        let float = oracle_float(self.float);
        let sums = widen(&self.sums());
        let expected = oracle::token::rms_norm(&sums, &widen(&self.weight), f64::from(EPS), float);
        // Half a step of the type for the result, and two for a quotient that tips over to its neighbour, if the type
        // is not f32's. Up to 64 roundings of a thread's and a team's sum, halved by the root, and seven more on the
        // way.
        let unit = float.unit_roundoff();
        let tips = if self.float == Float::F32 { 1.0 } else { 3.0 };
        let relative = tips * unit + 39.0 * 2f64.powi(-24);
        for (i, (&found, expected)) in found.iter().zip(expected).enumerate() {
            let error = (f64::from(found) - expected).abs();
            let bound = expected.abs() * relative + 1e-7;
            assert!(
                error <= bound,
                "{what}: {i} is {found:e}, not {expected:e} ± {bound:e}"
            );
        }
    }
}

#[test]
fn every_shape() {
    let Some(device) = Device::get() else { return };
    for k in lengths() {
        for m in row_counts(k) {
            let float = FLOATS[(k + m) % 3];
            Problem::new((m, k), k, float, (k + m / 2) % 2 == 0).check(&device);
        }
    }
}

#[test]
fn every_type_and_residual() {
    let Some(device) = Device::get() else { return };
    for float in FLOATS {
        for residual in [false, true] {
            for (k, stride) in [
                (64, 64),
                (2048, 2048),
                (4096, 4104),
                (4096, 4097),
                (8192, 8192),
                (100, 101),
            ] {
                Problem::new((3, k), stride, float, residual).check(&device);
            }
            Problem::new((700, 4096), 4096, float, residual).check(&device);
        }
    }
}

/// Short rows, many of which share a block, as in norms of heads.
#[test]
fn many_rows() {
    let Some(device) = Device::get() else { return };
    for k in [64, 128, 1024, 1032] {
        Problem::new((5000, k), k, Float::Bf16, false).check(&device);
    }
    // So many that a thread has four pieces.
    Problem::new((20_001, 128), 128, Float::Bf16, true).check(&device);
}

/// The arithmetic is the CPU's but for the order of a sum: results are the same or neighbours, and seldom not the same.
#[test]
fn agrees_with_the_cpu() {
    let Some(device) = Device::get() else { return };
    let problem = Problem::new((60, 4096), 4096, Float::Bf16, false);
    let values = Values::new(&device, 60, 4096, 4096, Float::Bf16);
    problem.run(&device, values.output(), false, false);
    let narrow = |values: &[f32]| -> Vec<half::bf16> {
        values
            .iter()
            .map(|&value| half::bf16::from_f32(value))
            .collect()
    };
    let mut expected = Vec::new();
    let set = cpu::InstructionSet::best();
    cpu::rms_norm(
        set,
        4096,
        &narrow(&problem.x),
        &narrow(&problem.weight),
        EPS,
        &mut expected,
    );
    let found = narrow(&values.get(&device));
    let differ = found
        .iter()
        .zip(&expected)
        .filter(|(found, expected)| found != expected);
    let count = differ.count();
    assert!(
        count * 200 <= found.len(),
        "{count} of {} differ",
        found.len()
    );
}

#[test]
fn zeros_stay_zeros_and_nan_stays_in_its_row() {
    let Some(device) = Device::get() else { return };
    for k in [70, 4096] {
        let mut problem = Problem::new((3, k), k, Float::Bf16, false);
        problem.x.fill(0.0);
        problem.x[k + 5] = f32::NAN;
        let values = Values::new(&device, 3, k, k, Float::Bf16);
        problem.run(&device, values.output(), false, false);
        let normed = values.get(&device);
        assert!(
            normed[..k]
                .iter()
                .chain(&normed[2 * k..])
                .all(|&y| y == 0.0)
        );
        assert!(normed[k..2 * k].iter().all(|y| y.is_nan()));
        let codes = Codes::new(&device, 3, k, k.next_multiple_of(16), Mode::Token);
        problem.run(&device, codes.output(), false, false);
        codes
            .get(&device)
            .assert_is(&on_cpu(&normed, k, Mode::Token), &normed, "special rows");
    }
}
