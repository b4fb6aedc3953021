//! Rows that kernels write: as values, or quantized at once, with the bits of the CPU.

use candle_kernels_fp8::metal::{Float, Output, Quantization, TENSOR_SCALES};

use crate::emulator::{Emulator, Memory};
use crate::values::{Mode, POISON, assert_same, assert_same_codes, from_bytes, on_cpu};

pub(crate) const MODES: [Mode; 5] = [
    Mode::Token,
    Mode::Group(128),
    Mode::Group(7),
    Mode::Static(0.05),
    Mode::Tensor,
];

pub(crate) fn row_counts(k: usize) -> &'static [usize] {
    match k {
        8 | 40 | 128 => &[1, 2, 3, 17, 300],
        1000.. => &[1, 3],
        _ => &[1, 5],
    }
}

/// Room for codes `[m, k]`, `stride` apart, and their scales.
pub(crate) struct Codes<'a> {
    device: &'a Emulator,
    pub(crate) codes: Memory,
    pub(crate) scales: Memory,
    k: usize,
    pub(crate) stride: usize,
    mode: Mode,
}

impl<'a> Codes<'a> {
    pub(crate) fn new(device: &'a Emulator, m: usize, k: usize, mode: Mode) -> Self {
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

    pub(crate) fn quantization(&self) -> Quantization<'_, Memory> {
        let scales = self.scales.slice();
        match self.mode {
            Mode::Token => Quantization::Token { scales },
            Mode::Group(group) => Quantization::Group { group, scales },
            Mode::Static(scale) => Quantization::Static { scale, scales },
            Mode::Tensor => unreachable!("has a kernel of its own"),
        }
    }

    pub(crate) fn output(&self) -> Output<'_, Memory> {
        Output::Codes {
            codes: self.codes.slice(),
            stride: self.stride,
            quantization: self.quantization(),
        }
    }

    /// That they are what the CPU makes of `x`, with zeros between rows.
    pub(crate) fn check(&self, x: &[f32], what: &str) {
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

/// Rows of values `[m, k]`, `stride` apart, between which nothing is written.
pub(crate) fn values_of(
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
