//! The matrix kernels of every instruction set that this processor has, over the case table.

#[path = "../../tests/oracle/mod.rs"]
mod oracle;

use candle_kernels_fp8::ScaleLayout;
use candle_kernels_fp8::cpu::{self, Activations, InstructionSet, Scaling};
use half::bf16;
use oracle::cases::{Case, Data, Random, table};
use oracle::{Float, Layout, Mode};
use std::io::Write;
use std::sync::Once;

/// The instruction sets to test. Says which those are and which this processor lacks, past what captures output.
fn sets() -> Vec<InstructionSet> {
    static ONCE: Once = Once::new();
    let known = InstructionSet::known();
    ONCE.call_once(|| {
        for (name, set) in &known {
            let line = match set {
                Some(_) => format!("TESTED: the kernels for {name}\n"),
                None => format!("SKIPPED: this processor has no {name}\n"),
            };
            // If it cannot be said, the tests are as good.
            let _ = std::io::stderr().write_all(line.as_bytes());
        }
    });
    known.into_iter().filter_map(|(_, set)| set).collect()
}

/// Runs `test` on each instruction set.
fn on_all(test: impl Fn(InstructionSet)) {
    sets().into_iter().for_each(test);
}

/// A vector without elements in memory that holds NaN.
fn poisoned(len: usize) -> Vec<f32> {
    let mut out = vec![f32::NAN; len];
    out.clear();
    out
}

fn layout(layout: Layout) -> ScaleLayout {
    match layout {
        Layout::Tensor => ScaleLayout::Tensor,
        Layout::Channel => ScaleLayout::Channel,
        Layout::Block(rows, cols) => ScaleLayout::Block { rows, cols },
    }
}

fn run(set: InstructionSet, case: &Case, data: &Data) -> Vec<f32> {
    let (m, k) = (case.m(), case.k);
    let mut codes = vec![0u8; m * k];
    let mut scales = vec![0f32; m * k];
    let scaling = match case.mode {
        Mode::Full => None,
        Mode::Token => Some(Scaling::Token),
        Mode::Tensor | Mode::Static(_) => Some(Scaling::Tensor),
        Mode::Group(group) => Some(Scaling::Group(group)),
    };
    if let Some(scaling) = scaling {
        scales.truncate(scaling.len(m, k));
    }
    match case.mode {
        Mode::Full => {}
        Mode::Token => cpu::quantize_groups(&data.x, k, k, &mut codes, &mut scales),
        Mode::Tensor => scales = vec![cpu::quantize_tensor(&data.x, &mut codes)],
        Mode::Static(scale) => {
            scales = vec![scale];
            cpu::quantize_static(&data.x, scale, &mut codes);
        }
        Mode::Group(group) => cpu::quantize_groups(&data.x, k, group, &mut codes, &mut scales),
    }
    let activations = match scaling {
        None => Activations::Values(&data.x),
        Some(scaling) => Activations::Codes {
            codes: &codes,
            scales: &scales,
            scaling,
        },
    };
    let weight = cpu::Weight {
        n: case.n,
        codes: &data.weight,
        scales: &data.scales,
        layout: layout(case.layout),
        bias: case.bias.then_some(&data.bias[..]),
    };
    let mut outs = [poisoned(m * case.n)];
    let args = cpu::ScaledMm {
        m,
        k,
        activations,
        weights: &[weight],
    };
    cpu::scaled_mm(set, &args, &mut outs);
    let [out] = outs;
    out
}

/// Compares what all instruction sets give with the oracle.
fn check(case: &Case) {
    let data = case.data();
    let expected = case.expected(&data);
    for set in sets() {
        let found: Vec<f64> = run(set, case, &data).into_iter().map(f64::from).collect();
        if let Err(text) = expected.check(&found, case.k, Float::F32) {
            panic!("{}: {case:?}: {text}", set.name());
        }
    }
}

#[test]
fn every_one_agrees_with_the_oracle() {
    table().iter().for_each(check);
}

/// Rows around what is multiplied at once, features around panels, K around vectors and panels.
#[test]
fn every_remainder() {
    let mut seed = 100;
    for m in (1..=14).chain([23, 24, 25, 36, 37]) {
        for (n, k) in [
            (1, 2),
            (31, 63),
            (33, 65),
            (16, 127),
            (17, 129),
            (34, 513),
            (3, 1),
            (48, 1026),
        ] {
            for (layout, mode) in [
                (Layout::Channel, Mode::Token),
                (Layout::Tensor, Mode::Full),
                (Layout::Block(128, 128), Mode::Group(128)),
                (Layout::Block(5, 3), Mode::Group(7)),
            ] {
                seed += 1;
                check(&Case {
                    lead: vec![m],
                    n,
                    k,
                    layout,
                    mode,
                    float: Float::F32,
                    bias: seed % 3 == 0,
                    seed,
                });
            }
        }
    }
}

/// Each code in each place that a vector or a panel has, subnormals and NaN included, against an activation of 1.
#[test]
fn every_code_everywhere() {
    on_all(|set| {
        for m in [1, 3, 20] {
            let k = 197;
            for shift in [0, 1, 77] {
                let weight: Vec<u8> = (0..256 * k)
                    .map(|i| ((i / k + shift) % 256) as u8)
                    .collect();
                for at in [0, 1, 15, 16, 63, 64, 130, 191, 192, 196] {
                    let mut x = vec![0f32; m * k];
                    for row in x.chunks_mut(k) {
                        row[at] = 1.0;
                    }
                    // A NaN times zero is a NaN: only the weight at `at` may be one.
                    let mut weight = weight.clone();
                    for row in weight.chunks_mut(k) {
                        for (i, code) in row.iter_mut().enumerate() {
                            if i != at && *code & 0x7f == 0x7f {
                                *code = 0x38;
                            }
                        }
                    }
                    let args = cpu::ScaledMm {
                        m,
                        k,
                        activations: Activations::Values(&x),
                        weights: &[cpu::Weight {
                            n: 256,
                            codes: &weight,
                            scales: &[1.0],
                            layout: ScaleLayout::Tensor,
                            bias: None,
                        }],
                    };
                    let mut outs = [poisoned(m * 256)];
                    cpu::scaled_mm(set, &args, &mut outs);
                    for row in outs[0].chunks(256) {
                        for (n, &found) in row.iter().enumerate() {
                            let expected = oracle::decode(((n + shift) % 256) as u8);
                            let same = f64::from(found) == expected
                                || (found.is_nan() && expected.is_nan());
                            assert!(
                                same,
                                "{} code {n} + {shift} at {at}: {found}, expected {expected}",
                                set.name()
                            );
                        }
                    }
                }
            }
        }
    });
}

/// f32 activations enter with all of their bits: 1 + 2^-23 times 1 is not rounded.
#[test]
fn activations_keep_their_precision() {
    on_all(|set| {
        let values = [
            1.0 + f32::EPSILON,
            -3.000_000_7,
            1e-30,
            16_777_215.0,
            1e30,
            0.1,
            f32::INFINITY,
            f32::NAN,
        ];
        for m in [1, 11] {
            for value in values {
                let x = vec![value; m];
                let args = cpu::ScaledMm {
                    m,
                    k: 1,
                    activations: Activations::Values(&x),
                    weights: &[cpu::Weight {
                        n: 1,
                        codes: &[0x38],
                        scales: &[1.0],
                        layout: ScaleLayout::Tensor,
                        bias: None,
                    }],
                };
                let mut outs = [poisoned(m)];
                cpu::scaled_mm(set, &args, &mut outs);
                for y in &outs[0] {
                    assert!(
                        *y == value || (y.is_nan() && value.is_nan()),
                        "{}: {value} became {y}",
                        set.name()
                    );
                }
            }
        }
    });
}

#[test]
fn several_weights_at_once_are_the_same_as_one_by_one() {
    on_all(|set| {
        for case in table() {
            let data = case.data();
            if case.mode != Mode::Full {
                continue;
            }
            let (m, k) = (case.m(), case.k);
            let weight = cpu::Weight {
                n: case.n,
                codes: &data.weight,
                scales: &data.scales,
                layout: layout(case.layout),
                bias: None,
            };
            // The same rows without the last, if scales allow it: another N.
            let fewer = cpu::Weight {
                n: case.n - 1,
                codes: &data.weight[..(case.n - 1) * k],
                scales: &data.scales[..weight.layout.len(case.n - 1, k)],
                ..weight
            };
            let product = |weights: &[cpu::Weight<'_>]| {
                let mut outs = vec![poisoned(m * case.n); weights.len()];
                let args = cpu::ScaledMm {
                    m,
                    k,
                    activations: Activations::Values(&data.x),
                    weights,
                };
                cpu::scaled_mm(set, &args, &mut outs);
                outs
            };
            let together = product(&[weight, fewer, weight]);
            assert_eq!(
                together[0],
                product(&[weight])[0],
                "{}: {case:?}",
                set.name()
            );
            assert_eq!(
                together[1],
                product(&[fewer])[0],
                "{}: {case:?}",
                set.name()
            );
            assert_eq!(together[2], together[0], "{}: {case:?}", set.name());
        }
    });
}

/// BF16 weights, against a sum in f64.
#[test]
fn dense_weights_agree_with_a_plain_sum() {
    on_all(|set| {
        let mut random = Random(9);
        for m in [1, 2, 3, 4, 5, 9, 13, 40] {
            for (n, k) in [(1, 1), (33, 70), (40, 128), (65, 1030)] {
                for bits in [0xffff_0000u32, 0xffff_ffff] {
                    let x: Vec<f32> = (0..m * k)
                        .map(|_| f32::from_bits(random.signed().to_bits() & bits))
                        .collect();
                    let weight: Vec<bf16> = (0..n * k)
                        .map(|_| bf16::from_f32(random.signed()))
                        .collect();
                    let bias: Vec<f32> = (0..n).map(|_| random.signed()).collect();
                    let mut out = poisoned(m * n);
                    cpu::dense_mm(set, (m, n, k), &x, &weight, Some(&bias), &mut out);
                    for (row, x) in x.chunks(k).enumerate() {
                        for (feature, w) in weight.chunks(k).enumerate() {
                            let terms = x.iter().zip(w).map(|(x, w)| f64::from(*x) * w.to_f64());
                            let expected = terms.clone().sum::<f64>() + f64::from(bias[feature]);
                            let magnitude = terms.map(f64::abs).sum::<f64>() + 1.0;
                            let error = (f64::from(out[row * n + feature]) - expected).abs();
                            // Each term meets at most k + 4 roundings: products, additions, planes, bias.
                            let bound = (k + 4) as f64 * 2f64.powi(-24) * magnitude;
                            assert!(
                                error <= bound,
                                "{} [{m}, {n}, {k}]: {error:e} > {bound:e}",
                                set.name()
                            );
                        }
                    }
                }
            }
        }
    });
}
