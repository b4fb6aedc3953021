//! Problems: those of the case table that every device runs, and more, for what tiles of kernels on a GPU are like.

use candle_kernels_fp8::ScaleLayout;
use candle_kernels_fp8::cuda::{Accumulation, Float, Scaling};

use crate::oracle::cases::{Case, Data, Random};
use crate::oracle::{self, Layout, Mode};
use crate::problem::{Problem, X, bytes_of, values_of};

pub(crate) const M: [usize; 18] = [
    1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 64, 65, 127, 128, 129, 255, 300, 513,
];
pub(crate) const N: [usize; 12] = [1, 7, 8, 15, 64, 100, 127, 128, 129, 256, 272, 1000];
pub(crate) const K: [usize; 13] = [1, 16, 32, 48, 100, 112, 128, 144, 256, 272, 519, 2064, 4096];

const fn block(rows: usize, cols: usize) -> ScaleLayout {
    ScaleLayout::Block { rows, cols }
}

/// How scales lie where activations are codes: the usual ones, those that change at multiples of 128, any.
pub(crate) const OF_CODES: [(ScaleLayout, Scaling); 16] = [
    (ScaleLayout::Channel, Scaling::Token),
    (block(128, 128), Scaling::Group(128)),
    (ScaleLayout::Tensor, Scaling::Tensor),
    (ScaleLayout::Channel, Scaling::Tensor),
    (block(128, 128), Scaling::Token),
    (ScaleLayout::Channel, Scaling::Token),
    (ScaleLayout::Channel, Scaling::Group(128)),
    (block(128, 128), Scaling::Group(128)),
    (ScaleLayout::Tensor, Scaling::Token),
    (block(128, 128), Scaling::Tensor),
    (ScaleLayout::Tensor, Scaling::Group(128)),
    (block(64, 256), Scaling::Group(384)),
    (block(16, 24), Scaling::Group(10)),
    (block(5, 128), Scaling::Group(5000)),
    (block(1, 5000), Scaling::Group(64)),
    (block(256, 640), Scaling::Group(96)),
];

/// How scales lie where activations are values.
pub(crate) const OF_VALUES: [ScaleLayout; 8] = [
    ScaleLayout::Channel,
    block(128, 128),
    ScaleLayout::Tensor,
    ScaleLayout::Channel,
    block(128, 128),
    block(32, 64),
    block(7, 256),
    block(5, 48),
];

const FLOATS: [Float; 3] = [Float::Bf16, Float::F16, Float::F32];

/// Finite codes, each as likely as the others.
fn codes(random: &mut Random, count: usize) -> Vec<u8> {
    (0..count).map(|_| random.finite_code()).collect()
}

/// A value as a type holds it.
fn rounded(value: f32, float: Float) -> f32 {
    values_of(&bytes_of(&[value], float), float)[0] as f32
}

/// Scales that span 2^8, such that results of the largest K still fit F16.
fn scales(random: &mut Random, count: usize) -> Vec<f32> {
    let scale = |i| 2f32.powi(-4 - ((i * 5) % 9)) * (1.5 + random.signed() / 2.0);
    (0..count as i32).map(scale).collect()
}

/// A problem of random numbers, of these sizes and scales; `x_float` is none for codes.
pub(crate) fn problem(
    (m, n, k): (usize, usize, usize),
    layout: ScaleLayout,
    scaling: Scaling,
    x_float: Option<Float>,
    seed: u64,
) -> Problem {
    let mut random = Random(seed);
    let x = match x_float {
        Some(float) => {
            let value = |_| rounded(random.signed().powi(3) * 4.0, float);
            X::Values((0..m * k).map(value).collect(), float)
        }
        None => {
            let codes = codes(&mut random, m * k);
            X::Codes(codes, scales(&mut random, scaling.len(m, k)), scaling)
        }
    };
    let weight = codes(&mut random, n * k);
    let scales = scales(&mut random, layout.len(n, k));
    let bias_float = FLOATS[random.bits() as usize % 3];
    let bias = (0..n).map(|_| rounded(random.signed() * 8.0, bias_float));
    let bias: Vec<f32> = bias.collect();
    Problem {
        m,
        n,
        k,
        x,
        weight,
        scales,
        layout,
        bias: (!seed.is_multiple_of(3)).then_some((bias, bias_float)),
        out: FLOATS[(seed / 2 % 3) as usize],
        accumulation: match seed % 5 {
            0 => Accumulation::Fast,
            _ => Accumulation::Promoted,
        },
        padding: [0, 0, 1, 3][(seed / 3 % 4) as usize],
        dependent: seed % 2 == 1,
    }
}

/// Sizes so that each M meets each second N and almost each K, in an order that has no pattern.
pub(crate) fn sizes() -> Vec<(usize, usize, usize)> {
    let mut random = Random(77);
    let mut shuffled = |mut values: Vec<usize>| {
        for i in (1..values.len()).rev() {
            values.swap(i, random.bits() as usize % (i + 1));
        }
        values
    };
    let (m, n, k) = (
        shuffled(M.to_vec()),
        shuffled(N.to_vec()),
        shuffled(K.to_vec()),
    );
    let mut sizes = Vec::new();
    for round in 0..6 {
        for (i, &m) in m.iter().enumerate() {
            let n = n[(i + 2 * round + i / N.len()) % N.len()];
            let k = k[(i * 3 + round + i / K.len()) % K.len()];
            sizes.push((m, n, k));
        }
    }
    sizes
}

/// The problem of a case, whose activations the oracle quantizes.
pub(crate) fn of_case(case: &Case, data: &Data) -> Problem {
    let (m, k) = (case.m(), case.k);
    let float = match case.float {
        oracle::Float::Bf16 => Float::Bf16,
        oracle::Float::F16 => Float::F16,
        oracle::Float::F32 => Float::F32,
    };
    let wide: Vec<f64> = data.x.iter().map(|x| f64::from(*x)).collect();
    let quantized = oracle::quantize(&wide, k, case.mode);
    let scaling = match case.mode {
        Mode::Full => None,
        Mode::Token => Some(Scaling::Token),
        Mode::Tensor | Mode::Static(_) => Some(Scaling::Tensor),
        Mode::Group(group) => Some(Scaling::Group(group)),
    };
    // The oracle has a scale for each activation. Without activations, a tensor still has one.
    let scale_at =
        |row: usize, col: usize| *quantized.scales.get(row * k + col).unwrap_or(&1.0) as f32;
    let x = match scaling {
        None => X::Values(data.x.clone(), float),
        Some(scaling) => {
            let scales = match scaling {
                Scaling::Tensor => vec![scale_at(0, 0)],
                Scaling::Token => (0..m).map(|row| scale_at(row, 0)).collect(),
                Scaling::Group(group) => {
                    let of_row = |row| (0..k).step_by(group).map(move |col| scale_at(row, col));
                    (0..m).flat_map(of_row).collect()
                }
            };
            X::Codes(quantized.codes.clone(), scales, scaling)
        }
    };
    Problem {
        m,
        n: case.n,
        k,
        x,
        weight: data.weight.clone(),
        scales: data.scales.clone(),
        layout: match case.layout {
            Layout::Tensor => ScaleLayout::Tensor,
            Layout::Channel => ScaleLayout::Channel,
            Layout::Block(rows, cols) => block(rows, cols),
        },
        bias: case.bias.then(|| (data.bias.clone(), float)),
        out: float,
        accumulation: Accumulation::Promoted,
        padding: case.seed as usize % 2,
        dependent: false,
    }
}
