//! Quantizers: the same codes and scales as on the CPU.

use candle_kernels_fp8::cuda::{self, Float, Quantize, QuantizeTensor};
use candle_kernels_fp8::e4m3;
use half::{bf16, f16};

use crate::oracle::{self, cases::Random};
use crate::rows::{Codes, FLOATS, Mode, Rows, activations, on_cpu, round, widen};
use crate::support_cuda::Device;
use crate::{lengths, row_counts};

/// Quantizes what is on the device.
fn run(
    device: &Device,
    (m, k): (usize, usize),
    float: Float,
    rows: &Rows,
    codes: &Codes,
    mode: Mode,
) {
    let args = Quantize {
        m,
        k,
        x: rows.address(),
        float,
        row_stride: rows.stride,
        codes: codes.address(),
        codes_stride: codes.stride,
        quantization: codes.quantization(),
        dependent: false,
    };
    if mode != Mode::Tensor {
        // SAFETY: the memory is as large as the sizes say.
        unsafe { cuda::quantize(&device.stream, &args) }.unwrap();
        return;
    }
    let scratch = device.upload(&vec![0xff; cuda::TENSOR_SCRATCH]);
    let args = QuantizeTensor {
        m,
        k,
        x: args.x,
        float,
        row_stride: args.row_stride,
        codes: args.codes,
        codes_stride: args.codes_stride,
        scale: codes.scales(),
        scratch: scratch.address,
        dependent: false,
    };
    // SAFETY: as above.
    unsafe { cuda::quantize_tensor(&device.stream, &args) }.unwrap();
    device.download(&scratch).unwrap();
}

/// Compares with the CPU. Strides are of the input, in elements, and of the codes.
fn check(device: &Device, x: &[f32], k: usize, float: Float, mode: Mode, strides: (usize, usize)) {
    let m = x.len() / k;
    let rows = Rows::new(device, x, k, strides.0, float);
    let codes = Codes::new(device, m, k, strides.1, mode);
    run(device, (m, k), float, &rows, &codes, mode);
    let what = format!("{mode:?} of {float:?} [{m}, {k}], strides {strides:?}");
    codes.get(device).assert_is(&on_cpu(x, k, mode), x, &what);
    rows.assert_untouched(device);
}

fn dense(k: usize) -> (usize, usize) {
    (k, k.next_multiple_of(16))
}

#[test]
fn every_shape() {
    let Some(device) = Device::get() else { return };
    for k in lengths() {
        for m in row_counts(k) {
            let float = FLOATS[(k + m) % 3];
            let x = activations(m, k, float, (k * 1000 + m) as u64);
            for mode in [
                Mode::Token,
                Mode::Group(128),
                Mode::Static(0.003),
                Mode::Tensor,
            ] {
                check(&device, &x, k, float, mode, dense(k));
            }
        }
    }
}

#[test]
fn every_group() {
    let Some(device) = Device::get() else { return };
    for group in [1, 3, 8, 16, 32, 64, 96, 128, 200, 256, 512, 1024, 5000] {
        for k in [40, 128, 1000, 2048, 4096, 4100] {
            for (m, float) in [(1, Float::Bf16), (5, Float::F16), (3, Float::F32)] {
                let x = activations(m, k, float, (k + group) as u64);
                check(&device, &x, k, float, Mode::Group(group), dense(k));
            }
        }
    }
}

/// More rows than a device runs at a time: threads have more of a row each, and short rows share blocks.
#[test]
fn many_rows() {
    let Some(device) = Device::get() else { return };
    let sizes = [
        (40_001, 8),
        (9_000, 40),
        (9_000, 256),
        (3_000, 1000),
        (2_500, 1032),
        (1_500, 4096),
    ];
    for (m, k) in sizes {
        let x = activations(m, k, Float::Bf16, k as u64);
        for mode in [
            Mode::Token,
            Mode::Group(128),
            Mode::Static(0.003),
            Mode::Tensor,
        ] {
            check(&device, &x, k, Float::Bf16, mode, dense(k));
        }
    }
    for float in [Float::F16, Float::F32] {
        let x = activations(900, 4096, float, 9);
        check(&device, &x, 4096, float, Mode::Token, dense(4096));
        check(&device, &x, 4096, float, Mode::Group(128), dense(4096));
    }
}

/// Rows and codes that do not start where vectors can be read, and codes with room between rows.
#[test]
fn every_alignment() {
    let Some(device) = Device::get() else { return };
    for (k, stride) in [
        (64usize, 64),
        (64, 65),
        (64, 72),
        (1000, 1024),
        (4096, 4099),
        (4096, 8192),
        (33, 40),
    ] {
        for codes_stride in [k, k + 1, k + 8, k + 100, k.next_multiple_of(16) + 32] {
            for mode in [
                Mode::Token,
                Mode::Group(128),
                Mode::Static(0.01),
                Mode::Tensor,
            ] {
                let x = activations(5, k, Float::Bf16, (stride + codes_stride) as u64);
                check(&device, &x, k, Float::Bf16, mode, (stride, codes_stride));
            }
        }
    }
    for (shift, codes_shift) in [(0, 1), (1, 0), (3, 8), (4, 8), (0, 8), (8, 4)] {
        for (float, k) in [(Float::Bf16, 256), (Float::F16, 2048), (Float::F32, 100)] {
            for mode in [
                Mode::Token,
                Mode::Group(64),
                Mode::Static(0.01),
                Mode::Tensor,
            ] {
                let x = activations(3, k, float, shift as u64);
                let rows = Rows::shifted(&device, &x, (k, k), float, shift);
                let codes = Codes::shifted(&device, 3, (k, k + 16), mode, codes_shift);
                run(&device, (3, k), float, &rows, &codes, mode);
                let what = format!("{mode:?} of {float:?}, shifted {shift} and {codes_shift}");
                codes
                    .get(&device)
                    .assert_is(&on_cpu(&x, k, mode), &x, &what);
            }
        }
    }
}

fn every_half(float: Float) -> Vec<f32> {
    let value = |bits| match float {
        Float::Bf16 => bf16::from_bits(bits).to_f32(),
        _ => f16::from_bits(bits).to_f32(),
    };
    (0..=u16::MAX).map(value).collect()
}

#[test]
fn every_value_of_16_bits() {
    let Some(device) = Device::get() else { return };
    for float in [Float::Bf16, Float::F16] {
        let x = every_half(float);
        // Rows of one exponent: with NaN and infinities in the last ones of each sign.
        for k in [64, 100, 128, 256, 1024] {
            let whole = &x[..x.len() / k * k];
            check(&device, whole, k, float, Mode::Token, dense(k));
            check(&device, whole, k, float, Mode::Group(32), dense(k));
        }
        // From the smallest subnormal to the largest finite scale.
        let mut scales = vec![
            1e-45,
            1e-40,
            f32::MIN_POSITIVE,
            1.0,
            448.0,
            1.0 / 448.0,
            f32::MAX,
        ];
        scales.extend((-125..127).step_by(9).map(|e| 1.37 * 2f32.powi(e)));
        for scale in scales {
            check(
                &device,
                &x,
                1 << 12,
                float,
                Mode::Static(scale),
                dense(1 << 12),
            );
        }
    }
}

/// Zeros, NaN, infinities, subnormals and the largest values, alone and together, where each kernel has them.
#[test]
fn special_values() {
    let Some(device) = Device::get() else { return };
    let nan = f32::NAN;
    let inf = f32::INFINITY;
    let (tiny, small, huge) = (1e-45, 1e-39, f32::MAX);
    let sets: [&[f32]; 12] = [
        &[0.0],
        &[-0.0, 0.0],
        &[nan],
        &[-nan, 1.0],
        &[inf],
        &[-inf, 1.0, -1.0, 0.0, -0.0],
        &[inf, nan],
        &[tiny, -tiny, 0.0, -0.0],
        &[small, -small, tiny, -tiny],
        &[huge, -huge, 1.0, -1.0, tiny, -tiny],
        &[1e30, -1e-30, 1e20, -1e-45],
        &[1e-30, -1e-31, 1e-40, -0.0],
    ];
    for k in [1, 7, 8, 40, 128, 1000, 4096, 16384, 20000] {
        let mut random = Random(k as u64);
        let mut x = Vec::new();
        for set in sets {
            // In each row, at a few places, and everywhere.
            let mut row = vec![0.0; k];
            for &value in set {
                row[random.bits() as usize % k] = value;
            }
            x.extend(row);
            x.extend((0..k).map(|_| set[random.bits() as usize % set.len()]));
        }
        for float in FLOATS {
            let x: Vec<f32> = x.iter().map(|&x| round(x, float)).collect();
            for mode in [Mode::Token, Mode::Group(128), Mode::Group(20)] {
                check(&device, &x, k, float, mode, dense(k));
            }
            for scale in [1e-45, 1e-38, 0.02, 1e38] {
                check(&device, &x, k, float, Mode::Static(scale), dense(k));
            }
            // With one scale, each row alone: NaN would take all.
            for rows in x.chunks(2 * k) {
                check(&device, rows, k, float, Mode::Tensor, dense(k));
            }
        }
    }
}

/// Quotients next to where one code becomes another, for scales of all sizes: an error of one unit in the last place
/// would show in every second of them.
#[test]
fn quotients_between_codes() {
    let Some(device) = Device::get() else { return };
    let mut random = Random(77);
    let k = 4096;
    let mut x = Vec::new();
    for row in 0..300 {
        let amax = f32::from_bits(random.bits() & 0x007f_ffff | (row % 254 + 1) << 23);
        let scale = (f64::from(amax) / 448.0) as f32;
        let start = x.len();
        x.push(amax);
        while x.len() < start + k {
            // The middle of two neighbouring codes, or where subnormal ones have it.
            let code = random.bits() as u8 & 0x7f;
            let middle = match code {
                0x7e | 0x7f => continue,
                _ => (e4m3::decode(code) + e4m3::decode(code + 1)) / 2.0,
            };
            let nearest = (f64::from(middle) * f64::from(scale)) as f32;
            let moved = nearest
                .to_bits()
                .wrapping_add(random.bits() % 7)
                .wrapping_sub(3);
            let sign = random.bits() & 0x8000_0000;
            x.push(f32::from_bits(moved & 0x7fff_ffff | sign).clamp(-amax, amax));
        }
    }
    check(&device, &x, k, Float::F32, Mode::Token, dense(k));
    // Rounded, they are further away, but each scale is met by many.
    let rounded: Vec<f32> = x.iter().map(|&x| round(x, Float::Bf16)).collect();
    check(&device, &rounded, k, Float::Bf16, Mode::Token, dense(k));
    check(
        &device,
        &rounded,
        k,
        Float::Bf16,
        Mode::Group(128),
        dense(k),
    );
    // Any bits at all.
    let any: Vec<f32> = (0..300 * k)
        .map(|_| f32::from_bits(random.bits()))
        .collect();
    for mode in [
        Mode::Group(8),
        Mode::Group(5),
        Mode::Static(3e-20),
        Mode::Static(0.3),
    ] {
        check(&device, &any, k, Float::F32, mode, dense(k));
    }
}

#[test]
fn agrees_with_the_oracle() {
    let Some(device) = Device::get() else { return };
    for k in [1, 5, 8, 40, 128, 136, 1000] {
        for float in FLOATS {
            let x = activations(5, k, float, k as u64);
            let modes = [
                (Mode::Token, oracle::Mode::Token),
                (Mode::Group(128), oracle::Mode::Group(128)),
                (Mode::Group(24), oracle::Mode::Group(24)),
                (Mode::Static(0.01), oracle::Mode::Static(0.01)),
                (Mode::Tensor, oracle::Mode::Tensor),
            ];
            for (mode, oracle_mode) in modes {
                let rows = Rows::new(&device, &x, k, k, float);
                let codes = Codes::new(&device, 5, k, k, mode);
                run(&device, (5, k), float, &rows, &codes, mode);
                let found = codes.get(&device);
                let expected = oracle::quantize(&widen(&x), k, oracle_mode);
                assert_eq!(found.codes, expected.codes, "{mode:?} of {float:?}, {k}");
                if mode == Mode::Token {
                    let scales: Vec<f64> = expected.scales.iter().copied().step_by(k).collect();
                    assert_eq!(widen(&found.scales), scales, "{float:?}, {k}");
                }
            }
        }
    }
}

#[test]
fn nothing_to_do() {
    let Some(device) = Device::get() else { return };
    for mode in [Mode::Token, Mode::Group(128), Mode::Static(0.5)] {
        check(&device, &[], 64, Float::Bf16, mode, (64, 64));
    }
}
