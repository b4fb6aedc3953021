//! Quantizers, norms and inner activations: the bits of the CPU where the arithmetic is defined to the bit, and quantizing
//! at once as quantizing afterwards.

use candle_kernels_fp8::cpu::{self, InstructionSet};
use candle_kernels_fp8::metal::{
    self, Float, Output, Quantization, Quantize, QuantizeTensor, Residual, RmsNorm, SiluMul,
    TENSOR_SCALES,
};
use half::{bf16, f16};

use crate::emulator::{Emulator, Memory};
use crate::oracle::{self, cases::Random};
use crate::values::{
    FLOATS, Mode, POISON, activations, apart, assert_same, assert_same_codes, from_bytes, lengths,
    on_cpu, oracle_float, round, to_bytes, widen,
};

const MODES: [Mode; 5] = [
    Mode::Token,
    Mode::Group(128),
    Mode::Group(7),
    Mode::Static(0.05),
    Mode::Tensor,
];

fn row_counts(k: usize) -> &'static [usize] {
    match k {
        8 | 40 | 128 => &[1, 2, 3, 17, 300],
        1000.. => &[1, 3],
        _ => &[1, 5],
    }
}

/// Room for codes `[m, k]`, `stride` apart, and their scales.
struct Codes<'a> {
    device: &'a Emulator,
    codes: Memory,
    scales: Memory,
    k: usize,
    stride: usize,
    mode: Mode,
}

impl<'a> Codes<'a> {
    fn new(device: &'a Emulator, m: usize, k: usize, mode: Mode) -> Self {
        let scales = match mode {
            Mode::Token => m,
            Mode::Group(group) => m * k.div_ceil(group),
            Mode::Tensor => TENSOR_SCALES,
            Mode::Static(_) => 1,
        };
        let stride = if m % 2 == 1 {
            k.next_multiple_of(16)
        } else {
            k
        };
        Self {
            device,
            codes: device.upload(&vec![POISON; m * stride]),
            scales: device.upload(&vec![POISON; scales * 4]),
            k,
            stride,
            mode,
        }
    }

    fn quantization(&self) -> Quantization<'_, Memory> {
        let scales = self.scales.slice();
        match self.mode {
            Mode::Token => Quantization::Token { scales },
            Mode::Group(group) => Quantization::Group { group, scales },
            Mode::Static(scale) => Quantization::Static { scale, scales },
            Mode::Tensor => unreachable!("has a kernel of its own"),
        }
    }

    fn output(&self) -> Output<'_, Memory> {
        Output::Codes {
            codes: self.codes.slice(),
            stride: self.stride,
            quantization: self.quantization(),
        }
    }

    /// That they are what the CPU makes of `x`, with zeros between rows.
    fn check(&self, x: &[f32], what: &str) {
        let what = format!("{:?} of {what}", self.mode);
        let (expected, expected_scales) = on_cpu(x, self.k, self.mode);
        let mut codes = Vec::new();
        for row in self.device.download(&self.codes).chunks(self.stride) {
            let (row, rest) = row.split_at(self.k);
            codes.extend(row);
            assert!(
                rest.iter().all(|&byte| byte == 0),
                "{what}: no zeros behind a row"
            );
        }
        let mut scales = from_bytes(&self.device.download(&self.scales), Float::F32);
        if self.mode == Mode::Tensor {
            scales = scales.split_off(TENSOR_SCALES - 1);
        }
        assert_same(&scales, &expected_scales, &what);
        assert_same_codes(&codes, &expected, &what);
    }
}

fn quantize(
    device: &Emulator,
    x: &[f32],
    (k, row_stride): (usize, usize),
    float: Float,
    mode: Mode,
) {
    let m = x.len() / k;
    let rows = to_bytes(x, float);
    let size = float.size();
    let memory = device.upload(&apart(&rows, k * size, row_stride * size));
    let codes = Codes::new(device, m, k, mode);
    let (x_slice, codes_stride) = (memory.slice(), codes.stride);
    let result = match mode {
        Mode::Tensor => metal::quantize_tensor(
            device,
            &QuantizeTensor {
                m,
                k,
                x: x_slice,
                float,
                row_stride,
                codes: codes.codes.slice(),
                codes_stride,
                scales: codes.scales.slice(),
            },
        ),
        _ => metal::quantize(
            device,
            &Quantize {
                m,
                k,
                x: x_slice,
                float,
                row_stride,
                codes: codes.codes.slice(),
                codes_stride,
                quantization: codes.quantization(),
            },
        ),
    };
    result.unwrap();
    codes.check(x, &format!("{float:?} [{m}, {k}]"));
    device.clear();
}

#[test]
fn quantizers() {
    let Some(device) = Emulator::get() else {
        return;
    };
    for k in lengths() {
        for &m in row_counts(k) {
            let float = FLOATS[(k + m) % 3];
            let x = activations(m, k, float, (k + m) as u64);
            for mode in MODES {
                quantize(&device, &x, (k, k + k % 3), float, mode);
            }
        }
    }
    device.assert_all_launched("quantize_");
}

/// NaN, infinities, zeros, and what is so small that its scale would be subnormal, or is subnormal itself.
#[test]
fn quantizers_of_what_is_special() {
    let Some(device) = Emulator::get() else {
        return;
    };
    let tiny = |steps: u32| f32::from_bits(steps);
    let edge = 448.0 * f32::MIN_POSITIVE;
    let mut random = Random(3);
    let mut rows = vec![
        vec![0.0; 8],
        vec![-0.0; 8],
        [1.0, f32::NAN, 3.0, 4.0, -f32::NAN, 6.0, 7.0, 8.0].to_vec(),
        [
            1.0,
            f32::INFINITY,
            3.0,
            4.0,
            f32::NEG_INFINITY,
            6.0,
            7.0,
            8.0,
        ]
        .to_vec(),
        [
            tiny(1),
            tiny(2),
            -tiny(3),
            tiny(0x7f_ffff),
            0.0,
            tiny(0x40_0000),
            -tiny(5),
            tiny(9),
        ]
        .to_vec(),
        vec![f32::MAX, 1e30, -1e36, 0.0, 1.0, f32::MIN, 3e38, -2e38],
    ];
    for amax in [
        edge,
        edge.next_down(),
        edge.next_up(),
        edge / 2.0,
        edge / 500.0,
    ] {
        rows.push(
            (0..8)
                .map(|i| {
                    if i == 3 {
                        -amax
                    } else {
                        random.signed() * amax
                    }
                })
                .collect(),
        );
    }
    for row in &rows {
        for mode in MODES
            .into_iter()
            .chain([f32::MIN_POSITIVE, 1e-36, 2e-30].map(Mode::Static))
        {
            quantize(&device, row, (8, 8), Float::F32, mode);
            let row: Vec<f32> = row.iter().map(|&x| round(x, Float::Bf16)).collect();
            quantize(&device, &row, (8, 8), Float::Bf16, mode);
        }
    }
    for mode in MODES {
        quantize(&device, &rows.concat(), (8, 9), Float::F32, mode);
    }
}

/// Room for values `[m, k]` between which nothing is written.
fn values_of(
    device: &Emulator,
    memory: &Memory,
    (k, stride): (usize, usize),
    float: Float,
) -> Vec<f32> {
    let bytes = device.download(memory);
    let mut values = Vec::new();
    for row in bytes.chunks(stride * float.size()) {
        let (row, rest) = row.split_at(k * float.size());
        values.extend(from_bytes(row, float));
        assert!(
            rest.iter().all(|&byte| byte == POISON),
            "written between rows"
        );
    }
    values
}

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
