//! Rows of values and of codes, on both sides.

use candle_kernels_fp8::cpu;
use candle_kernels_fp8::cuda::{Address, Float, Output, Quantization};
use half::{bf16, f16};

use crate::oracle;
use crate::oracle::cases::Random;
use crate::support_cuda::{Device, Guarded};

/// What outputs hold before.
pub(crate) const POISON: u8 = 0xa5;

pub(crate) const FLOATS: [Float; 3] = [Float::Bf16, Float::F16, Float::F32];

pub(crate) fn oracle_float(float: Float) -> oracle::Float {
    match float {
        Float::Bf16 => oracle::Float::Bf16,
        Float::F16 => oracle::Float::F16,
        Float::F32 => oracle::Float::F32,
    }
}

/// As the type holds it.
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

/// Rows `[m, k]` of values, `stride` apart, with NaN between them: nothing there may be read.
pub(crate) struct Rows {
    memory: Guarded,
    pub(crate) stride: usize,
    bytes: Vec<u8>,
    shift: usize,
    float: Float,
}

impl Rows {
    pub(crate) fn new(device: &Device, x: &[f32], k: usize, stride: usize, float: Float) -> Self {
        Self::shifted(device, x, (k, stride), float, 0)
    }

    /// Starts `shift` elements past a multiple of 16 bytes.
    pub(crate) fn shifted(
        device: &Device,
        x: &[f32],
        (k, stride): (usize, usize),
        float: Float,
        shift: usize,
    ) -> Self {
        let shift = shift * float.size();
        let mut bytes = vec![0xff; shift];
        for row in x.chunks(k) {
            bytes.extend(to_bytes(row, float));
            bytes.resize(bytes.len() + (stride - k) * float.size(), 0xff);
        }
        Self {
            memory: device.upload(&bytes),
            stride,
            bytes,
            shift,
            float,
        }
    }

    pub(crate) fn address(&self) -> Address {
        self.memory.address + self.shift as u64
    }

    /// What it holds now, with what is between rows.
    pub(crate) fn download(&self, device: &Device) -> Vec<f32> {
        from_bytes(
            &device.download(&self.memory).unwrap()[self.shift..],
            self.float,
        )
    }

    /// That nothing wrote to it.
    pub(crate) fn assert_untouched(&self, device: &Device) {
        assert!(
            device.download(&self.memory).unwrap() == self.bytes,
            "an input was written"
        );
    }
}

/// Room for rows `[m, k]` of values, `stride` apart.
pub(crate) struct Values {
    memory: Guarded,
    k: usize,
    stride: usize,
    float: Float,
}

impl Values {
    pub(crate) fn new(device: &Device, m: usize, k: usize, stride: usize, float: Float) -> Self {
        let memory = device.upload(&vec![POISON; m * stride * float.size()]);
        Self {
            memory,
            k,
            stride,
            float,
        }
    }

    pub(crate) fn address(&self) -> Address {
        self.memory.address
    }

    pub(crate) fn output(&self) -> Output {
        Output::Values {
            values: self.memory.address,
            stride: self.stride,
        }
    }

    /// The rows; what is between them is untouched.
    pub(crate) fn get(&self, device: &Device) -> Vec<f32> {
        let bytes = device.download(&self.memory).unwrap();
        let mut values = Vec::new();
        for row in bytes.chunks(self.stride * self.float.size()) {
            let (row, rest) = row.split_at(self.k * self.float.size());
            values.extend(from_bytes(row, self.float));
            assert!(
                rest.iter().all(|&byte| byte == POISON),
                "written between rows"
            );
        }
        values
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

/// Room for rows `[m, k]` of codes, `stride` apart, and their scales.
pub(crate) struct Codes {
    memory: Guarded,
    scales: Guarded,
    k: usize,
    pub(crate) stride: usize,
    mode: Mode,
    shift: usize,
}

/// Codes `[m, k]` and their scales.
#[derive(Debug)]
pub(crate) struct Quantized {
    pub(crate) codes: Vec<u8>,
    pub(crate) scales: Vec<f32>,
}

impl Codes {
    pub(crate) fn new(device: &Device, m: usize, k: usize, stride: usize, mode: Mode) -> Self {
        Self::shifted(device, m, (k, stride), mode, 0)
    }

    /// Starts `shift` bytes past a multiple of 16.
    pub(crate) fn shifted(
        device: &Device,
        m: usize,
        (k, stride): (usize, usize),
        mode: Mode,
        shift: usize,
    ) -> Self {
        let scales = match mode {
            Mode::Token => m,
            Mode::Group(group) => m * k.div_ceil(group),
            Mode::Tensor => 1,
            Mode::Static(_) => 0,
        };
        Self {
            memory: device.upload(&vec![POISON; m * stride + shift]),
            scales: device.upload(&vec![POISON; scales * 4]),
            k,
            stride,
            mode,
            shift,
        }
    }

    pub(crate) fn address(&self) -> Address {
        self.memory.address + self.shift as u64
    }

    /// Of the scale that goes to memory.
    pub(crate) fn scales(&self) -> Address {
        self.scales.address
    }

    pub(crate) fn quantization(&self) -> Quantization {
        let scales = self.scales.address;
        match self.mode {
            Mode::Token | Mode::Tensor => Quantization::Token { scales },
            Mode::Group(group) => Quantization::Group { group, scales },
            Mode::Static(scale) => Quantization::Static { scale },
        }
    }

    pub(crate) fn output(&self) -> Output {
        Output::Codes {
            codes: self.address(),
            stride: self.stride,
            quantization: self.quantization(),
        }
    }

    /// The codes and scales; what is between rows is zero.
    pub(crate) fn get(&self, device: &Device) -> Quantized {
        let bytes = device.download(&self.memory).unwrap();
        let (before, bytes) = bytes.split_at(self.shift);
        assert!(
            before.iter().all(|&byte| byte == POISON),
            "written before the first row"
        );
        let mut codes = Vec::new();
        for row in bytes.chunks(self.stride) {
            let (row, rest) = row.split_at(self.k);
            codes.extend(row);
            assert!(rest.iter().all(|&byte| byte == 0), "no zeros behind a row");
        }
        let scales = device.download(&self.scales).unwrap();
        Quantized {
            codes,
            scales: from_bytes(&scales, Float::F32),
        }
    }
}

/// What the CPU makes of it.
pub(crate) fn on_cpu(x: &[f32], k: usize, mode: Mode) -> Quantized {
    let mut codes = vec![0; x.len()];
    let scales = match mode {
        Mode::Token | Mode::Group(_) => {
            let group = if let Mode::Group(group) = mode {
                group
            } else {
                k
            };
            let mut scales = vec![0.0; x.len() / k * k.div_ceil(group)];
            cpu::quantize_groups(x, k, group, &mut codes, &mut scales);
            scales
        }
        Mode::Tensor => vec![cpu::quantize_tensor(x, &mut codes)],
        Mode::Static(scale) => {
            cpu::quantize_static(x, scale, &mut codes);
            Vec::new()
        }
    };
    Quantized { codes, scales }
}

impl Quantized {
    /// The same codes and scales, but that NaN is NaN. `x` and `what` are for the message.
    pub(crate) fn assert_is(&self, expected: &Self, x: &[f32], what: &str) {
        assert_same(&self.scales, &expected.scales, &format!("{what}: scales"));
        assert_eq!(self.codes.len(), expected.codes.len(), "{what}");
        let is_nan = |code: u8| code & 0x7f == 0x7f;
        for (i, (&found, &expected)) in self.codes.iter().zip(&expected.codes).enumerate() {
            let same = found == expected || is_nan(found) && is_nan(expected);
            assert!(
                same,
                "{what}: code {i} of {:e} is {found:#x}, not {expected:#x}",
                x[i]
            );
        }
    }
}

/// The same bits, but that NaN is NaN.
pub(crate) fn assert_same(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let same = found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan();
        assert!(same, "{what}: {i} is {found:e}, not {expected:e}");
    }
}
