//! What a token needs beside its products.

use std::hint::black_box;

use candle_kernels_fp8::cpu::{self, Attention, Heads, InstructionSet};
use criterion::{BenchmarkId, Criterion, Throughput};

use crate::naive::{self, assert_close, wide};

/// Hidden size, and the MLP's.
const HIDDEN: usize = 2048;
const INNER: usize = 8192;
/// Query heads, heads of keys and values, elements of a head.
const HEADS: usize = 32;
const KV_HEADS: usize = 8;
const DIM: usize = 64;

pub(crate) fn attention(criterion: &mut Criterion) {
    let set = InstructionSet::best();
    let mut group = criterion.benchmark_group("attention");
    for (name, queries, keys) in [("decode", 1, 1024), ("prefill", 512, 512)] {
        let q = naive::values(queries * HEADS * DIM);
        let k = naive::values(KV_HEADS * keys * DIM);
        let v: Vec<f32> = k.iter().rev().copied().collect();
        let scale = 1. / (DIM as f32).sqrt();
        let heads = |values| Heads {
            values,
            batch_stride: KV_HEADS * keys * DIM,
            head_stride: keys * DIM,
        };
        let args = Attention {
            batch: 1,
            queries,
            keys,
            heads: HEADS,
            kv_heads: KV_HEADS,
            dim: DIM,
            window: None,
            scale,
            q: &q,
            k: heads(&k),
            v: heads(&v),
        };
        let mut out = vec![0f32; queries * HEADS * DIM];
        cpu::attention(set, &args, &mut out);
        // The last query of the first, a middle and the last head.
        for head in [0, 13, HEADS - 1] {
            let at = ((queries - 1) * HEADS + head) * DIM;
            let kv = head / (HEADS / KV_HEADS) * keys * DIM;
            let [k, v] = [&k, &v].map(|values| wide(&values[kv..][..keys * DIM]));
            let expected = naive::attend(&wide(&q[at..][..DIM]), &k, &v, f64::from(scale));
            assert_close(&out[at..][..DIM], &expected, 1e-5);
        }

        let throughput = match queries {
            // Keys and values.
            1 => Throughput::Bytes((2 * 4 * KV_HEADS * keys * DIM) as u64),
            // Scores and sums, of the keys that a query sees.
            _ => Throughput::Elements((2 * 2 * HEADS * DIM * queries * (queries + 1) / 2) as u64),
        };
        group.throughput(throughput);
        group.bench_function(BenchmarkId::new(name, keys), |bencher| {
            bencher.iter(|| cpu::attention(set, black_box(&args), &mut out));
        });
    }
}

pub(crate) fn rms_norm(criterion: &mut Criterion) {
    let set = InstructionSet::best();
    let mut group = criterion.benchmark_group("rms_norm");
    let weight = naive::values(HIDDEN);
    for rows in [1, 512] {
        let x = naive::values(rows * HIDDEN);
        let mut out = vec![0f32; rows * HIDDEN];
        cpu::rms_norm(set, HIDDEN, &x, &weight, 1e-5, &mut out);
        for (x, out) in x.chunks_exact(HIDDEN).zip(out.chunks_exact(HIDDEN)).take(8) {
            let expected = naive::rms_norm(&wide(x), &wide(&weight), f64::from(1e-5f32));
            assert_close(out, &expected, 1e-5);
        }

        group.throughput(Throughput::Elements((rows * HIDDEN) as u64));
        group.bench_function(BenchmarkId::new("rows", rows), |bencher| {
            bencher.iter(|| cpu::rms_norm(set, HIDDEN, black_box(&x), &weight, 1e-5, &mut out));
        });
    }
}

pub(crate) fn silu_mul(criterion: &mut Criterion) {
    let set = InstructionSet::best();
    let mut group = criterion.benchmark_group("silu_mul");
    for rows in [1, 512] {
        let gate: Vec<f32> = (naive::values(rows * INNER).iter())
            .map(|value| value * 20.)
            .collect();
        let up = naive::values(rows * INNER);
        let mut out = vec![0f32; rows * INNER];
        cpu::silu_mul(set, &gate, &up, &mut out);
        let silu_mul = |(gate, up): (f64, f64)| gate / (1. + (-gate).exp()) * up;
        let some = INNER.min(out.len());
        let pairs = wide(&gate[..some]).into_iter().zip(wide(&up[..some]));
        let expected: Vec<f64> = pairs.map(silu_mul).collect();
        assert_close(&out[..some], &expected, 1e-5);

        group.throughput(Throughput::Elements((rows * INNER) as u64));
        group.bench_function(BenchmarkId::new("rows", rows), |bencher| {
            bencher.iter(|| cpu::silu_mul(set, black_box(&gate), &up, &mut out));
        });
    }
}
