//! Quantizers: the bits of the CPU.

use candle_kernels_fp8::metal::{self, Float, Quantize, QuantizeTensor};

use crate::emulator::Emulator;
use crate::oracle::cases::Random;
use crate::rows::{Codes, MODES, row_counts};
use crate::values::{FLOATS, Mode, activations, apart, lengths, round, to_bytes};

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
