//! Every kernel for products over every problem that it serves.

use candle_kernels_fp8::metal::{
    Activations, Float, Kernel, ScaledMm, Scaling, padded, scaled_mm, scaled_mm_with,
};
use std::collections::BTreeSet;

use crate::emulator::Emulator;
use crate::oracle::cases::{Case, Data, table};
use crate::oracle::{self, Layout, Mode};
use crate::values::{POISON, apart, float_of, from_bytes, layout_of, to_bytes, widen};

/// The results of a kernel, or of the one that is chosen.
fn run(
    device: &Emulator,
    case: &Case,
    data: &Data,
    kernel: Option<Kernel>,
) -> Result<Vec<f64>, String> {
    let (m, n, k, float) = (case.m(), case.n, case.k, float_of(case.float));
    let quantized = oracle::quantize(&widen(&data.x), k, case.mode);
    // The oracle has a scale for each activation. Without activations, a tensor still has one.
    let scale_at =
        |row: usize, col: usize| *quantized.scales.get(row * k + col).unwrap_or(&1.0) as f32;
    let (scaling, x_scales) = match case.mode {
        Mode::Full => (None, Vec::new()),
        Mode::Token => (
            Some(Scaling::Token),
            (0..m).map(|row| scale_at(row, 0)).collect(),
        ),
        Mode::Tensor | Mode::Static(_) => (Some(Scaling::Tensor), vec![scale_at(0, 0)]),
        Mode::Group(group) => {
            let of_row = |row| (0..k).step_by(group).map(move |col| (row, col));
            let scales = (0..m).flat_map(of_row).map(|(row, col)| scale_at(row, col));
            (Some(Scaling::Group(group)), scales.collect())
        }
    };
    // Dense rows, whose loads are only aligned for some K; rows that start at multiples of 16 bytes; and these, apart.
    let stride = |row: usize| match case.seed % 3 {
        0 => row,
        1 => padded(row),
        _ => padded(row) + 16,
    };
    let upload = |bytes: &[u8], row: usize| device.upload(&apart(bytes, row, stride(row)));
    let (x, x_row) = match scaling {
        None => (to_bytes(&data.x, float), k * float.size()),
        Some(_) => (quantized.codes, k),
    };
    // Past what is aligned, for some.
    let shift = if case.seed % 4 == 3 { 4 } else { 0 };
    let x_memory = device.upload(&[vec![POISON; shift], apart(&x, x_row, stride(x_row))].concat());
    let x_scales = device.upload(&to_bytes(&x_scales, Float::F32));
    let weight = upload(&data.weight, k);
    let weight_scales = device.upload(&to_bytes(&data.scales, Float::F32));
    // Values of the case's type are values of F32 as well.
    let bias_float = if case.seed.is_multiple_of(2) {
        Float::F32
    } else {
        float
    };
    let bias = device.upload(&to_bytes(&data.bias, bias_float));
    let out = device.upload(&vec![POISON; m * n * float.size()]);
    let values = x_memory.slice().after(shift);
    let args = ScaledMm {
        m,
        n,
        k,
        activations: match scaling {
            None => Activations::Values { values, float },
            Some(scaling) => Activations::Codes {
                codes: values,
                scales: x_scales.slice(),
                scaling,
            },
        },
        row_stride: stride(x_row) / (x_row / k),
        weight: weight.slice(),
        weight_stride: stride(k),
        weight_scales: weight_scales.slice(),
        layout: layout_of(case.layout),
        bias: case.bias.then(|| (bias.slice(), bias_float)),
        out: out.slice(),
        out_float: float,
    };
    match kernel {
        Some(kernel) => scaled_mm_with(device, &args, kernel)?,
        None => scaled_mm(device, &args)?,
    }
    let found = from_bytes(&device.download(&out), float);
    device.clear();
    Ok(widen(&found))
}

/// Runs all kernels that serve a case, and says which.
fn check(device: &Emulator, case: &Case, data: &Data) -> BTreeSet<Kernel> {
    let expected = case.expected(data);
    let serve = Kernel::ALL
        .into_iter()
        .filter(|kernel| kernel.serves(case.m()));
    for kernel in serve.clone() {
        let result = run(device, case, data, Some(kernel))
            .and_then(|found| expected.check(&found, case.k, case.float));
        if let Err(text) = result {
            panic!("{kernel}: {case:?}: {text}");
        }
    }
    serve.collect()
}

#[test]
fn the_case_table() {
    let Some(device) = Emulator::get() else {
        return;
    };
    let mut seen = BTreeSet::new();
    for case in table() {
        let data = case.data();
        seen.extend(check(&device, &case, &data));
        let found = run(&device, &case, &data, None).unwrap();
        assert_eq!(
            case.expected(&data).check(&found, case.k, case.float),
            Ok(()),
            "{case:?}"
        );
    }
    assert_eq!(seen.len(), Kernel::ALL.len());
}

/// Activations of each kind, with scales of each kind.
const KINDS: [(Mode, Layout); 12] = [
    (Mode::Token, Layout::Channel),
    (Mode::Full, Layout::Channel),
    (Mode::Group(128), Layout::Block(128, 128)),
    (Mode::Full, Layout::Tensor),
    (Mode::Tensor, Layout::Tensor),
    (Mode::Full, Layout::Block(32, 64)),
    (Mode::Token, Layout::Block(128, 128)),
    (Mode::Full, Layout::Block(5, 48)),
    (Mode::Group(10), Layout::Block(16, 24)),
    (Mode::Static(0.011), Layout::Channel),
    (Mode::Group(48), Layout::Channel),
    (Mode::Group(5000), Layout::Block(7, 1)),
];

/// Sizes around those of tiles, with all that a product can be made of.
#[test]
fn every_size() {
    let Some(device) = Emulator::get() else {
        return;
    };
    let rows = (1..=18).chain([31, 32, 33, 63, 64, 65, 129]);
    let features = [1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 100, 129];
    let columns: Vec<usize> = (1..=33)
        .chain([48, 63, 64, 65, 128, 144, 272, 513, 1040])
        .collect();
    let mut seed = 0;
    let mut next = || {
        seed += 1;
        seed
    };
    for (i, m) in rows.enumerate() {
        for (j, &n) in features.iter().enumerate() {
            // Each K meets many M and N; large products take long.
            let k = columns[(i * 17 + j * 5) % columns.len()];
            if m * n * k > 1 << 21 {
                continue;
            }
            let seed = next();
            let (mode, layout) = KINDS[(seed % 12) as usize];
            let case = Case {
                lead: vec![m],
                n,
                k,
                layout,
                mode,
                float: [oracle::Float::Bf16, oracle::Float::F16, oracle::Float::F32]
                    [(seed / 12 % 3) as usize],
                bias: seed % 5 < 3,
                seed,
            };
            check(&device, &case, &case.data());
        }
    }
    // Every K with every type of activations, by kernels for rows and for blocks.
    for &k in &columns {
        for (i, (mode, float)) in [
            (Mode::Token, oracle::Float::F32),
            (Mode::Full, oracle::Float::Bf16),
            (Mode::Full, oracle::Float::F16),
            (Mode::Full, oracle::Float::F32),
        ]
        .repeat(2)
        .into_iter()
        .enumerate()
        {
            for m in [1, 2, 3, 7, 20] {
                let case = Case {
                    lead: vec![m],
                    n: 9,
                    k,
                    layout: [Layout::Channel, Layout::Block(4, 40)][i / 4],
                    mode,
                    float,
                    bias: false,
                    seed: next(),
                };
                check(&device, &case, &case.data());
            }
        }
    }
    device.assert_all_launched("scaled_mm_");
}

/// Each code in each place that matters, subnormals and NaN included, against an activation of 1: exact.
#[test]
fn every_code_everywhere() {
    let Some(device) = Emulator::get() else {
        return;
    };
    let (n, k) = (256, 80);
    for m in [1, 2, 3, 8, 12, 20] {
        for (mode, float) in [
            (Mode::Static(1.0), oracle::Float::F32),
            (Mode::Full, oracle::Float::Bf16),
            (Mode::Full, oracle::Float::F16),
            (Mode::Full, oracle::Float::F32),
        ] {
            for (shift, at) in [0, 1, 7, 15, 16, 31, 32, 63, 79].into_iter().enumerate() {
                let code = |row: usize| ((row + shift * 47) % 256) as u8;
                // A NaN times zero is a NaN: only the weight at `at` may be one.
                let weight = (0..n * k).map(|i| match (code(i / k), i % k == at) {
                    (0x7f | 0xff, false) => 0x38,
                    (code, _) => code,
                });
                let case = Case {
                    lead: vec![m],
                    n,
                    k,
                    layout: Layout::Tensor,
                    mode,
                    float,
                    bias: false,
                    seed: (at + m) as u64,
                };
                let data = Data {
                    x: (0..m * k)
                        .map(|i| f32::from(u8::from(i % k == at)))
                        .collect(),
                    weight: weight.collect(),
                    scales: vec![1.0],
                    bias: vec![0.0; n],
                };
                let found = run(&device, &case, &data, None).unwrap();
                for (i, found) in found.into_iter().enumerate() {
                    let expected = oracle::decode(code(i % n));
                    let same = found == expected || found.is_nan() && expected.is_nan();
                    assert!(
                        same,
                        "{float:?} [{m}]: {:#x} at {at} gives {found}",
                        code(i % n)
                    );
                }
            }
        }
    }
}

/// A NaN in a row of the weight makes its column NaN, one in a row of activations its row, and nothing else.
#[test]
fn nan_stays_in_its_row() {
    let Some(device) = Emulator::get() else {
        return;
    };
    for case in table() {
        if case.m() < 2 || case.n < 2 {
            continue;
        }
        let mut data = case.data();
        data.weight[case.k * (case.n - 1)] = 0x7f;
        check(&device, &case, &data);
        // Quantized with one scale, all activations become NaN.
        data.x[case.k - 1] = f32::NAN;
        check(&device, &case, &data);
    }
}
