//! Dense products of few rows: near sums in f64, and the same bits for a row whatever is computed beside it.

use candle_kernels_fp8::cuda::{self, DenseMm, Float, dense_mm_serves};

use crate::oracle::Adder;
use crate::oracle::cases::Random;
use crate::rows::{FLOATS, POISON, Rows, from_bytes, oracle_float, round};
use crate::support_cuda::Device;

const HALVES: [Float; 2] = [Float::Bf16, Float::F16];

#[derive(Debug, Clone, Copy)]
struct Case {
    m: usize,
    n: usize,
    k: usize,
    float: Float,
    out_float: Float,
    bias: Option<Float>,
    /// Elements between rows: of `x`, of the weight.
    gaps: [usize; 2],
    dependent: bool,
}

impl Case {
    fn new(m: usize, n: usize, k: usize) -> Self {
        let at = m + n + k / 8;
        Self {
            m,
            n,
            k,
            float: HALVES[at % 2],
            out_float: FLOATS[at % 3],
            bias: [None, Some(FLOATS[at / 3 % 3])][at / 2 % 2],
            gaps: [at % 3 * 8, at / 3 % 3 * 8],
            dependent: at % 5 < 2,
        }
    }
}

/// A case's numbers: each row of the factors in another range.
struct Data {
    x: Vec<f32>,
    weight: Vec<f32>,
    bias: Vec<f32>,
}

impl Data {
    fn new(case: &Case) -> Self {
        let mut random = Random((case.n * 31 + case.k) as u64);
        let mut rows = |rows: usize, float: Float| -> Vec<f32> {
            let row = |i: usize| 2f32.powi((i % 7) as i32 - 3);
            (0..rows * case.k)
                .map(|i| round(random.signed() * row(i / case.k), float))
                .collect()
        };
        let (weight, x) = (rows(case.n, case.float), rows(case.m, case.float));
        let bias_float = case.bias.unwrap_or(Float::F32);
        let bias = (0..case.n).map(|_| round(random.signed() * 4.0, bias_float));
        Self {
            bias: bias.collect(),
            x,
            weight,
        }
    }

    /// A row of `x`, a feature.
    fn terms<'a>(&'a self, case: &Case, row: usize, col: usize) -> impl Iterator<Item = f64> + 'a {
        let x = &self.x[row * case.k..][..case.k];
        let weight = &self.weight[col * case.k..][..case.k];
        x.iter()
            .zip(weight)
            .map(|(&x, &weight)| f64::from(x) * f64::from(weight))
    }
}

/// The results, which are computed twice, into memory that held something else.
fn run(device: &Device, case: &Case, data: &Data) -> Vec<f32> {
    let &Case { m, n, k, .. } = case;
    let strides = case.gaps.map(|gap| k + gap);
    let x = Rows::new(device, &data.x, k, strides[0], case.float);
    let weight = Rows::new(device, &data.weight, k, strides[1], case.float);
    let bias = case
        .bias
        .map(|float| (Rows::new(device, &data.bias, n, n, float), float));
    let once = |poison: u8| {
        let out = device.upload(&vec![poison; m * n * case.out_float.size()]);
        let args = DenseMm {
            m,
            n,
            k,
            x: x.address(),
            row_stride: strides[0],
            weight: weight.address(),
            weight_stride: strides[1],
            float: case.float,
            bias: bias.as_ref().map(|(rows, float)| (rows.address(), *float)),
            out: out.address,
            out_float: case.out_float,
            dependent: case.dependent,
        };
        // SAFETY: the memory is as large as the sizes say.
        unsafe { cuda::dense_mm(&device.stream, &args) }.unwrap();
        device
            .download(&out)
            .unwrap_or_else(|error| panic!("{case:?}: {error}"))
    };
    let (first, second) = (once(0xff), once(POISON));
    if let Some(at) = (0..first.len()).find(|&at| first[at] != second[at]) {
        let at = at / case.out_float.size();
        let (row, col) = (at / n, at % n);
        panic!("{case:?}: [{row}, {col}] is not the same again: not written, or a race");
    }
    x.assert_untouched(device);
    weight.assert_untouched(device);
    from_bytes(&first, case.out_float)
}

fn check(device: &Device, case: Case) {
    let data = Data::new(&case);
    let found = run(device, &case, &data);
    let float = oracle_float(case.out_float);
    for (i, &found) in found.iter().enumerate() {
        let (row, col) = (i / case.n, i % case.n);
        let (mut sum, mut magnitude, mut squares) = (0.0, 0.0, 0.0);
        for term in data.terms(&case, row, col) {
            sum += term;
            magnitude += term.abs();
            squares += term * term;
        }
        let bias = case.bias.map_or(0.0, |_| f64::from(data.bias[col]));
        let expected = sum + bias;
        // What tensor cores cut off; four sums of warps and a bias, added in f32; the rounding of the result.
        let added = Adder::Values.error(case.k, magnitude, squares.sqrt())
            + 5.0 * 2f64.powi(-24) * (magnitude + bias.abs());
        let bound = added + (expected.abs() + added) * float.unit_roundoff() + float.min_step();
        let error = (f64::from(found) - expected).abs();
        // Also false of NaN.
        let fits = error <= bound || expected.abs() > float.max() && found.is_infinite();
        assert!(
            fits,
            "{case:?}: [{row}, {col}] is {found:e}, not {expected:e} ± {bound:e}"
        );
    }
}

/// Few and small, for the sanitizers: with a K that goes round the ring, and several tiles.
#[test]
fn each_kernel() {
    let Some(device) = Device::get() else { return };
    for float in HALVES {
        for m in [1, 8, 9, 16] {
            for (n, k) in [(40, 1544), (70, 8)] {
                let case = Case {
                    float,
                    dependent: true,
                    ..Case::new(m, n, k)
                };
                check(&device, case);
            }
        }
    }
}

#[test]
fn all_lengths_of_rows() {
    let Some(device) = Device::get() else { return };
    // Steps of the block are of 256, chunks of 64, pieces of 32 and of 8.
    let around = [256, 512, 1024, 1280, 2048, 4096, 14336];
    let around = around
        .iter()
        .flat_map(|&k| [k - 64, k - 8, k, k + 8, k + 40, k + 64]);
    for k in (8..=336).step_by(8).chain(around) {
        for m in [1, 7, 16] {
            check(&device, Case::new(m, 37, k));
        }
    }
}

#[test]
fn all_numbers_of_features_and_tokens() {
    let Some(device) = Device::get() else { return };
    for n in (1..=70).chain([255, 256, 257, 1000]) {
        for m in [1, 2, 8, 9, 16] {
            check(&device, Case::new(m, n, 264));
        }
    }
    for m in 1..=16 {
        for n in [5, 32, 100] {
            for k in [64, 72, 1000] {
                check(&device, Case::new(m, n, k));
            }
        }
    }
}

#[test]
fn all_types() {
    let Some(device) = Device::get() else { return };
    for float in HALVES {
        for out_float in FLOATS {
            for bias in [None, Some(Float::Bf16), Some(Float::F16), Some(Float::F32)] {
                for m in [3, 11] {
                    let case = Case {
                        float,
                        out_float,
                        bias,
                        ..Case::new(m, 70, 520)
                    };
                    check(&device, case);
                }
            }
        }
    }
}

/// More tiles than blocks run at a time, a part of the last round, and a part of the last tile.
#[test]
fn blocks_take_several_tiles() {
    let Some(device) = Device::get() else { return };
    let round = device.gpu.processors as usize * 2 * 32;
    for n in [round - 1, round, round + 1, 2 * round + 33, 3 * round - 31] {
        for (m, k) in [(1, 64), (4, 1000), (16, 520)] {
            check(&device, Case::new(m, n, k));
        }
    }
}

#[test]
fn sizes_of_models() {
    let Some(device) = Device::get() else { return };
    for (n, k) in [(32_000, 512), (2048, 4096), (1024, 8192)] {
        for m in [1, 8, 16] {
            check(&device, Case::new(m, n, k));
        }
    }
}

/// A row's results depend neither on the rows beside it nor on how many features there are.
#[test]
fn rows_are_computed_alike() {
    let Some(device) = Device::get() else { return };
    for float in HALVES {
        let whole = Case {
            float,
            out_float: Float::F32,
            bias: None,
            gaps: [0, 0],
            ..Case::new(16, 9000, 1544)
        };
        let data = Data::new(&whole);
        let all = run(&device, &whole, &data);
        for (first, m, n) in [(0, 1, 9000), (15, 1, 9000), (3, 8, 9000), (5, 9, 77)] {
            let part = Case { m, n, ..whole };
            let data = Data {
                x: data.x[first * whole.k..][..m * whole.k].to_vec(),
                weight: data.weight[..n * whole.k].to_vec(),
                bias: Vec::new(),
            };
            let found = run(&device, &part, &data);
            for row in 0..m {
                let expected = &all[(first + row) * whole.n..][..n];
                assert!(
                    found[row * n..][..n] == *expected,
                    "row {row} of {m} from {first} on"
                );
            }
        }
    }
}

/// A NaN or an infinity stays in the row or the feature that it is in.
#[test]
fn special_values_stay_in_place() {
    let Some(device) = Device::get() else { return };
    for special in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for (m, at) in [(5, 0), (5, 519), (16, 300)] {
            let case = Case {
                bias: None,
                ..Case::new(m, 75, 520)
            };
            for of_weight in [false, true] {
                let mut data = Data::new(&case);
                let (row, col) = (2, 40);
                match of_weight {
                    true => data.weight[col * case.k + at] = special,
                    false => data.x[row * case.k + at] = special,
                }
                for (i, y) in run(&device, &case, &data).iter().enumerate() {
                    let hit = if of_weight {
                        i % case.n == col
                    } else {
                        i / case.n == row
                    };
                    assert_eq!(y.is_finite(), !hit, "{case:?}: {i} is {y}");
                }
            }
        }
    }
}

#[test]
fn what_is_served() {
    let args = DenseMm {
        m: 16,
        n: 10,
        k: 72,
        x: 160,
        row_stride: 80,
        weight: 1600,
        weight_stride: 72,
        float: Float::F16,
        bias: None,
        out: 2,
        out_float: Float::F16,
        dependent: false,
    };
    assert!(dense_mm_serves(&args));
    for refused in [
        DenseMm { m: 17, ..args },
        DenseMm { k: 0, ..args },
        DenseMm { k: 68, ..args },
        DenseMm { x: 168, ..args },
        DenseMm {
            weight: 1608,
            ..args
        },
        DenseMm {
            row_stride: 84,
            ..args
        },
        DenseMm {
            weight_stride: 76,
            ..args
        },
        DenseMm {
            float: Float::F32,
            ..args
        },
    ] {
        assert!(!dense_mm_serves(&refused), "{refused:?}");
    }
}
