//! Values as bytes of a type, and how results are compared.

use candle_kernels_fp8::ScaleLayout;
use candle_kernels_fp8::cpu;
use candle_kernels_fp8::metal::Float;
use half::{bf16, f16};

use crate::oracle;
use crate::oracle::cases::Random;

pub(crate) const FLOATS: [Float; 3] = [Float::Bf16, Float::F16, Float::F32];

/// NaN as a code and as a float of any type: what memory holds before.
pub(crate) const POISON: u8 = 0xff;

/// Numbers of elements: every remainder of what a thread, a SIMD group and a tile handle at once, and more than a
/// group.
pub(crate) fn lengths() -> impl Iterator<Item = usize> {
    (1..=40).chain(120..=136).chain([1000, 1025, 4100])
}

pub(crate) fn oracle_float(float: Float) -> oracle::Float {
    match float {
        Float::Bf16 => oracle::Float::Bf16,
        Float::F16 => oracle::Float::F16,
        Float::F32 => oracle::Float::F32,
    }
}

pub(crate) fn float_of(float: oracle::Float) -> Float {
    match float {
        oracle::Float::Bf16 => Float::Bf16,
        oracle::Float::F16 => Float::F16,
        oracle::Float::F32 => Float::F32,
    }
}

pub(crate) fn layout_of(layout: oracle::Layout) -> ScaleLayout {
    match layout {
        oracle::Layout::Tensor => ScaleLayout::Tensor,
        oracle::Layout::Channel => ScaleLayout::Channel,
        oracle::Layout::Block(rows, cols) => ScaleLayout::Block { rows, cols },
    }
}

pub(crate) fn round(value: f32, float: Float) -> f32 {
    match float {
        Float::Bf16 => bf16::from_f32(value).to_f32(),
        Float::F16 => f16::from_f32(value).to_f32(),
        Float::F32 => value,
    }
}

pub(crate) fn to_bytes(values: &[f32], float: Float) -> Vec<u8> {
    let bytes = |&value: &f32| match float {
        Float::Bf16 => bf16::from_f32(value).to_le_bytes().to_vec(),
        Float::F16 => f16::from_f32(value).to_le_bytes().to_vec(),
        Float::F32 => value.to_le_bytes().to_vec(),
    };
    values.iter().flat_map(bytes).collect()
}

pub(crate) fn from_bytes(bytes: &[u8], float: Float) -> Vec<f32> {
    let value = |bytes: &[u8]| match float {
        Float::Bf16 => bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
        Float::F16 => f16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
        Float::F32 => f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
    };
    bytes.chunks_exact(float.size()).map(value).collect()
}

pub(crate) fn widen(values: &[f32]) -> Vec<f64> {
    values.iter().copied().map(f64::from).collect()
}

/// Rows of bytes, `stride` apart, with [`POISON`] between them, and nothing behind the last.
pub(crate) fn apart(bytes: &[u8], row: usize, stride: usize) -> Vec<u8> {
    let mut all = Vec::new();
    for row in bytes.chunks(row) {
        all.resize(all.len().next_multiple_of(stride), POISON);
        all.extend(row);
    }
    all
}

/// Values as activations are, a few large and many small, each row in another range, with a row of zeros if there are
/// many.
pub(crate) fn activations(m: usize, k: usize, float: Float, seed: u64) -> Vec<f32> {
    let mut random = Random(seed);
    let value = |i: usize| {
        let row = i / k;
        let value = random.signed().powi(3) * 2f32.powi((row % 7) as i32 - 3);
        round(if m > 3 && row == 2 { 0.0 } else { value }, float)
    };
    (0..m * k).map(value).collect()
}

/// The same bits, but that NaN is NaN.
pub(crate) fn assert_same(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let same = found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan();
        assert!(same, "{what}: {i} is {found:e}, not {expected:e}");
    }
}

/// The same codes, but that NaN is NaN.
pub(crate) fn assert_same_codes(found: &[u8], expected: &[u8], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let nan = |code: u8| code & 0x7f == 0x7f;
    for (i, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        let same = found == expected || nan(found) && nan(expected);
        assert!(same, "{what}: code {i} is {found:#x}, not {expected:#x}");
    }
}

/// A way to quantize.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Mode {
    Token,
    Group(usize),
    Static(f32),
    Tensor,
}

/// Codes and scales as the CPU makes them.
pub(crate) fn on_cpu(x: &[f32], k: usize, mode: Mode) -> (Vec<u8>, Vec<f32>) {
    let mut codes = vec![0; x.len()];
    let mut groups = |group: usize| {
        let mut scales = vec![0.0; x.len() / k * k.div_ceil(group)];
        cpu::quantize_groups(x, k, group, &mut codes, &mut scales);
        scales
    };
    let scales = match mode {
        Mode::Token => groups(k),
        Mode::Group(group) => groups(group),
        Mode::Tensor => vec![cpu::quantize_tensor(x, &mut codes)],
        Mode::Static(scale) => {
            cpu::quantize_static(x, scale, &mut codes);
            vec![scale]
        }
    };
    (codes, scales)
}
