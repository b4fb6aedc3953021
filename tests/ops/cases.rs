//! The case table that every device's ops run, and the data of a case.

use crate::oracle::{self, Float, Layout, Mode};
use candle_core::{DType, Device, Result, Tensor};
use candle_fp8::{Input, Quantization, ScaleLayout};
use float8::F8E4M3;

/// One `scaled_mm`.
#[derive(Debug, Clone)]
pub(crate) struct Case {
    /// Dimensions of the activations before K.
    pub(crate) lead: Vec<usize>,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) layout: Layout,
    pub(crate) mode: Mode,
    /// Of activations and result.
    pub(crate) float: Float,
    pub(crate) bias: bool,
    pub(crate) seed: u64,
}

/// The activations' dimensions before K, N, K, ... as in [`Case`].
type Row<'a> = (&'a [usize], usize, usize, Layout, Mode, Float, bool);

/// Sizes are odd, not square, and cross what kernels like to tile by: 4, 16, 128, 1024. Blocks are at least 3 × 2, the
/// last ones short.
pub(crate) fn table() -> Vec<Case> {
    use Float::{Bf16, F16, F32};
    use Layout::{Block, Channel, Tensor};
    use Mode::{Full, Group, Static, Token};
    #[rustfmt::skip]
    let rows: &[Row] = &[
        // lead,    N,   K,    weight scales,     activations,      dtype, bias
        (&[1],      33,  70,   Channel,           Token,            F32,  false),
        (&[1],      64,  128,  Channel,           Token,            Bf16, true),
        (&[5],      33,  70,   Channel,           Token,            F32,  true),
        (&[17],     130, 2100, Channel,           Token,            Bf16, false),
        (&[2, 3],   40,  96,   Channel,           Token,            F16,  true),
        (&[],       40,  96,   Channel,           Token,            F32,  false),
        (&[2, 1, 4], 7,  19,   Channel,           Token,            F32,  false),
        (&[3],      1,   1,    Channel,           Token,            F32,  true),
        (&[6],      50,  77,   Tensor,            Static(0.0078125), Bf16, false),
        (&[6],      50,  77,   Tensor,            Static(0.011),    F32,  true),
        (&[1],      50,  77,   Tensor,            Static(0.011),    F32,  true),
        (&[6],      50,  77,   Channel,           Static(0.0031),   F16,  false),
        (&[6],      50,  77,   Tensor,            Token,            F32,  false),
        (&[6],      50,  77,   Tensor,            Mode::Tensor,     F32,  false),
        (&[6],      50,  77,   Channel,           Mode::Tensor,     Bf16, true),
        (&[1],      300, 260,  Block(128, 128),   Group(128),       F32,  false),
        (&[7],      300, 260,  Block(128, 128),   Group(128),       F32,  true),
        (&[7],      300, 260,  Block(128, 128),   Group(128),       Bf16, false),
        (&[7],      300, 260,  Block(128, 128),   Token,            F32,  false),
        (&[7],      300, 260,  Block(128, 128),   Mode::Tensor,     F32,  false),
        (&[3],      37,  53,   Block(16, 24),     Group(10),        F32,  false),
        (&[3],      37,  53,   Block(16, 24),     Group(64),        F32,  true),
        (&[3],      37,  53,   Channel,           Group(7),         F32,  false),
        (&[4],      37,  53,   Tensor,            Full,             F32,  true),
        (&[4],      37,  53,   Channel,           Full,             F16,  false),
        (&[1],      37,  53,   Channel,           Full,             F32,  true),
        (&[4],      300, 260,  Block(128, 128),   Full,             Bf16, false),
        (&[2],      70,  4100, Channel,           Full,             F32,  false),
        (&[1],      70,  4100, Block(32, 1030),   Group(1000),      F32,  true),
        (&[9],      70,  4100, Block(32, 1030),   Group(1000),      F32,  true),
        (&[0],      33,  70,   Channel,           Token,            F32,  true),
        (&[2, 0],   33,  70,   Block(16, 24),     Group(16),        Bf16, false),
        (&[0],      33,  70,   Tensor,            Mode::Tensor,     F32,  false),
    ];
    rows.iter()
        .zip(1..)
        .map(|(&(lead, n, k, layout, mode, float, bias), seed)| Case {
            lead: lead.to_vec(),
            n,
            k,
            layout,
            mode,
            float,
            bias,
            seed,
        })
        .collect()
}

/// A case's numbers.
#[derive(Clone)]
pub(crate) struct Data {
    /// `[m, k]`, values of the case's float type; each row of another magnitude.
    pub(crate) x: Vec<f32>,
    /// Finite codes `[n, k]`, each as likely as the others.
    pub(crate) weight: Vec<u8>,
    /// Spanning 2^8.
    pub(crate) scales: Vec<f32>,
    /// `[n]`, values of the case's float type.
    pub(crate) bias: Vec<f32>,
}

/// Numbers that are the same everywhere.
pub(crate) struct Random(pub u64);

impl Random {
    pub(crate) fn bits(&mut self) -> u32 {
        self.0 = self
            .0
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (self.0 >> 32) as u32
    }

    /// Between -1 and 1.
    pub(crate) fn signed(&mut self) -> f32 {
        (self.bits() as f32 / 2f32.powi(31)) - 1.0
    }

    pub(crate) fn finite_code(&mut self) -> u8 {
        loop {
            let code = self.bits() as u8;
            if code & 0x7f != 0x7f {
                return code;
            }
        }
    }
}

impl Case {
    pub(crate) fn m(&self) -> usize {
        self.lead.iter().product()
    }

    pub(crate) fn data(&self) -> Data {
        let (m, n, k) = (self.m(), self.n, self.k);
        let mut random = Random(self.seed);
        let round = |value: f32| self.float.round(f64::from(value)) as f32;
        let x = (0..m * k)
            .map(|i| {
                // Cubed: a few large values, many small ones, as activations are.
                let value = random.signed().powi(3) * 2f32.powi((i / k % 5) as i32 - 2);
                // One row of zeros, when there are several.
                round(if m > 3 && i / k == 2 { 0.0 } else { value })
            })
            .collect();
        let weight = (0..n * k).map(|_| random.finite_code()).collect();
        let (rows, cols) = self.layout.grid(n, k);
        let scales = (0..rows * cols)
            .map(|i| 2f32.powi(-4 - ((i * 5) % 9) as i32) * (1.5 + random.signed() / 2.0))
            .collect();
        let bias = (0..n).map(|_| round(random.signed() * 8.0)).collect();
        Data {
            x,
            weight,
            scales,
            bias,
        }
    }

    /// What the oracle says, for other scales or another mode than the case's too.
    pub(crate) fn expected(&self, data: &Data) -> oracle::Product {
        let wide = |values: &[f32]| values.iter().map(|&v| f64::from(v)).collect::<Vec<_>>();
        let bias = wide(&data.bias);
        oracle::scaled_mm(
            &wide(&data.x),
            &data.weight,
            self.k,
            &data.scales,
            self.layout,
            self.mode,
            self.bias.then_some(&bias[..]),
        )
    }

    pub(crate) fn dtype(&self) -> DType {
        dtype(self.float)
    }

    /// The activations as a tensor `[lead.., K]`.
    pub(crate) fn x(&self, data: &Data, device: &Device) -> Result<Tensor> {
        let mut shape = self.lead.clone();
        shape.push(self.k);
        Tensor::from_slice(&data.x, shape, device)?.to_dtype(self.dtype())
    }

    /// The op's result.
    pub(crate) fn run(&self, data: &Data, device: &Device) -> Result<Tensor> {
        self.run_on(&self.x(data, device)?, data, device)
    }

    /// The op's result on activations that hold the case's numbers in whatever layout.
    pub(crate) fn run_on(&self, x: &Tensor, data: &Data, device: &Device) -> Result<Tensor> {
        let weight = codes(&data.weight, (self.n, self.k), device)?;
        let layout = layout(self.layout);
        let scale = Tensor::from_slice(&data.scales, layout.shape(self.n, self.k), device)?;
        let bias = Tensor::from_slice(&data.bias, self.n, device)?.to_dtype(self.dtype())?;
        candle_fp8::scaled_mm(
            input(x, self.mode),
            &weight,
            &scale,
            layout,
            self.bias.then_some(&bias),
        )
    }

    /// Compares a result with what is expected.
    pub(crate) fn check(
        &self,
        y: &Tensor,
        expected: &oracle::Product,
    ) -> std::result::Result<(), String> {
        let mut shape = self.lead.clone();
        shape.push(self.n);
        if y.dims() != shape || y.dtype() != self.dtype() {
            return Err(format!(
                "{:?} {:?}, expected {shape:?}",
                y.dtype(),
                y.dims()
            ));
        }
        let found = values(y).map_err(|e| e.to_string())?;
        expected.check(&found, self.k, self.float)
    }
}

pub(crate) fn dtype(float: Float) -> DType {
    match float {
        Float::Bf16 => DType::BF16,
        Float::F16 => DType::F16,
        Float::F32 => DType::F32,
    }
}

pub(crate) fn layout(layout: Layout) -> ScaleLayout {
    match layout {
        Layout::Tensor => ScaleLayout::Tensor,
        Layout::Channel => ScaleLayout::Channel,
        Layout::Block(rows, cols) => ScaleLayout::Block { rows, cols },
    }
}

pub(crate) fn input(x: &Tensor, mode: Mode) -> Input<'_> {
    match mode {
        Mode::Full => Input::Full(x),
        Mode::Token => Input::Quantize(x, Quantization::PerToken),
        Mode::Tensor => Input::Quantize(x, Quantization::PerTensor),
        Mode::Static(scale) => Input::Quantize(x, Quantization::Static(scale)),
        Mode::Group(group) => Input::Quantize(x, Quantization::PerGroup(group)),
    }
}

/// An F8E4M3 tensor of codes.
pub(crate) fn codes(
    codes: &[u8],
    shape: impl Into<candle_core::Shape>,
    device: &Device,
) -> Result<Tensor> {
    let codes: Vec<F8E4M3> = codes.iter().map(|&code| F8E4M3::from_bits(code)).collect();
    Tensor::from_vec(codes, shape.into(), device)
}

/// The codes of an F8E4M3 tensor.
pub(crate) fn code_bits(tensor: &Tensor) -> Result<Vec<u8>> {
    let codes = tensor.flatten_all()?.to_vec1::<F8E4M3>()?;
    Ok(codes.iter().map(F8E4M3::to_bits).collect())
}

/// A float tensor's values, flat.
pub(crate) fn values(tensor: &Tensor) -> Result<Vec<f64>> {
    let values = tensor
        .to_dtype(DType::F32)?
        .flatten_all()?
        .to_vec1::<f32>()?;
    Ok(values.into_iter().map(f64::from).collect())
}

/// FNV-1a of bytes: to freeze long vectors.
pub(crate) fn fnv(bytes: impl IntoIterator<Item = u8>) -> u64 {
    bytes.into_iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    })
}
