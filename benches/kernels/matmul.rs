//! The products, and the quantizer in front of them.

use std::hint::black_box;

use candle_kernels_fp8::ScaleLayout;
use candle_kernels_fp8::cpu::{self, Activations, InstructionSet, ScaledMm, Scaling, Weight};
use criterion::{BenchmarkId, Criterion, Throughput};
use half::bf16;

use crate::naive::{self, wide};
use crate::oracle::{self, Float, Layout, Mode};

/// Output features and input features of the weights.
const N: usize = 4096;
const K: usize = 2048;
/// Copies of a weight that take turns, so that few rows read it from memory.
const COPIES: usize = 16;
/// Rows of activations.
const ROWS: [usize; 3] = [1, 16, 512];
/// Output features that are compared with the oracle.
const CHECKED: usize = 8;

/// What limits a product with a weight of so many bytes.
fn limit(m: usize, weight_bytes: usize) -> Throughput {
    match m {
        0..=16 => Throughput::Bytes(weight_bytes as u64),
        _ => Throughput::Elements((2 * m * N * K) as u64),
    }
}

/// The first [`CHECKED`] columns of `[m, N]`.
fn checked_columns(y: &[f32]) -> Vec<f64> {
    let rows = y.chunks_exact(N);
    rows.flat_map(|row| wide(&row[..CHECKED])).collect()
}

pub(crate) fn scaled_mm(criterion: &mut Criterion) {
    let set = InstructionSet::best();
    let one: Vec<u8> = naive::codes(N * K);
    let scales: Vec<f32> = naive::values(N).iter().map(|v| v.abs() + 0.01).collect();
    let weights = one.repeat(COPIES);
    let mut group = criterion.benchmark_group("scaled_mm");
    for m in ROWS {
        let x = naive::values(m * K);
        let (mut codes, mut x_scales) = (vec![0; m * K], vec![0.; m]);
        cpu::quantize_groups(&x, K, K, &mut codes, &mut x_scales);
        let product = |codes_of_weight: &[u8], y: &mut [Vec<f32>; 1]| {
            let weight = Weight {
                n: N,
                codes: codes_of_weight,
                scales: &scales,
                layout: ScaleLayout::Channel,
                bias: None,
            };
            let activations = Activations::Codes {
                codes: &codes,
                scales: &x_scales,
                scaling: Scaling::Token,
            };
            let args = ScaledMm {
                m,
                k: K,
                activations,
                weights: &[weight],
            };
            cpu::scaled_mm(set, &args, y);
        };
        let mut y = [Vec::new()];
        product(&one, &mut y);
        let (some, some_scales) = (&one[..CHECKED * K], &scales[..CHECKED]);
        let expected = oracle::scaled_mm(
            &wide(&x),
            some,
            K,
            some_scales,
            Layout::Channel,
            Mode::Token,
            None,
        );
        let found = checked_columns(&y[0]);
        expected.check(&found, K, Float::F32).unwrap();

        let mut turn = weights.chunks_exact(N * K).cycle();
        group.throughput(limit(m, N * K + 4 * N));
        group.bench_function(BenchmarkId::new("M", m), |bencher| {
            bencher.iter(|| product(turn.next().unwrap(), &mut y));
        });
    }
}

pub(crate) fn dense_mm(criterion: &mut Criterion) {
    let set = InstructionSet::best();
    let one: Vec<bf16> = (naive::values(N * K).iter())
        .map(|&value| bf16::from_f32(value))
        .collect();
    let weights = one.repeat(COPIES / 2);
    let mut group = criterion.benchmark_group("dense_mm");
    for m in ROWS {
        let x = naive::values(m * K);
        let mut y = Vec::new();
        cpu::dense_mm(set, (m, N, K), &x, &one, None, &mut y);
        let some: Vec<f64> = one[..CHECKED * K].iter().map(|w| w.to_f64()).collect();
        naive::check_product(&wide(&x), &some, K, &checked_columns(&y));

        let mut turn = weights.chunks_exact(N * K).cycle();
        group.throughput(limit(m, 2 * N * K));
        group.bench_function(BenchmarkId::new("M", m), |bencher| {
            bencher.iter(|| {
                let weight = turn.next().unwrap();
                cpu::dense_mm(set, (m, N, K), black_box(&x), weight, None, &mut y);
            });
        });
    }
}

pub(crate) fn quantize(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("quantize_per_token");
    for m in ROWS {
        let x = naive::values(m * K);
        let (mut codes, mut scales) = (vec![0; m * K], vec![0.; m]);
        cpu::quantize_groups(&x, K, K, &mut codes, &mut scales);
        let rows = m.min(CHECKED);
        let expected = oracle::quantize(&wide(&x[..rows * K]), K, Mode::Token);
        assert_eq!(codes[..rows * K], expected.codes);
        for (row, &scale) in scales[..rows].iter().enumerate() {
            assert_eq!(f64::from(scale), expected.scales[row * K]);
        }

        group.throughput(Throughput::Elements((m * K) as u64));
        group.bench_function(BenchmarkId::new("rows", m), |bencher| {
            bencher.iter(|| cpu::quantize_groups(black_box(&x), K, K, &mut codes, &mut scales));
        });
    }
}
