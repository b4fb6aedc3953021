//! The case table's cases as tensors.

use crate::oracle::{self, Adder, Float, Layout, Mode};
use candle_core::{DType, Device, Result, Tensor};
use candle_fp8::{Codes, Input, Quantization, ScaleLayout};
use float8::F8E4M3;

pub(crate) use crate::oracle::cases::{Case, Data, Random, table};

impl Case {
    pub(crate) fn dtype(&self) -> DType {
        dtype(self.float)
    }

    /// The activations as a tensor `[lead.., K]`.
    pub(crate) fn x(&self, data: &Data, device: &Device) -> Result<Tensor> {
        let shape = [&self.lead[..], &[self.k]].concat();
        floats(&data.x, &shape, self.dtype(), device)
    }

    /// The op's result.
    pub(crate) fn run(&self, data: &Data, device: &Device) -> Result<Tensor> {
        self.run_on(&self.x(data, device)?, data, device)
    }

    /// The op's result on activations that hold the case's numbers in whatever layout.
    pub(crate) fn run_on(&self, x: &Tensor, data: &Data, device: &Device) -> Result<Tensor> {
        let weight = codes(&data.weight, (self.n, self.k), device)?;
        self.run_with(x, &weight, data, device)
    }

    /// The op's result on activations and the codes of the weight, in whatever layout.
    pub(crate) fn run_with<'a>(
        &self,
        x: &Tensor,
        weight: impl Into<Codes<'a>>,
        data: &Data,
        device: &Device,
    ) -> Result<Tensor> {
        let layout = layout(self.layout);
        let scale = Tensor::from_slice(&data.scales, layout.shape(self.n, self.k), device)?;
        let bias = Tensor::from_slice(&data.bias, self.n, device)?.to_dtype(self.dtype())?;
        candle_fp8::scaled_mm(
            input(x, self.mode),
            weight,
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
        let adder = match (y.device(), self.mode) {
            (Device::Cpu | Device::Metal(_), _) => Adder::F32,
            (_, Mode::Full) if self.float == Float::F32 => Adder::F32,
            (_, Mode::Full) => Adder::Values,
            _ => Adder::Codes(128),
        };
        expected.check_by(adder, &found, self.k, self.float)
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

/// A float tensor. GPUs give no memory of no size: one without elements is a part of another.
pub(crate) fn floats(
    values: &[f32],
    shape: &[usize],
    dtype: DType,
    device: &Device,
) -> Result<Tensor> {
    if !values.is_empty() {
        return Tensor::from_slice(values, shape, device)?.to_dtype(dtype);
    }
    let filled: Vec<usize> = shape.iter().map(|&dim| dim.max(1)).collect();
    let mut tensor = Tensor::zeros(filled, dtype, device)?;
    for (axis, &dim) in shape.iter().enumerate() {
        tensor = tensor.narrow(axis, 0, dim)?;
    }
    Ok(tensor)
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
    let tensor = tensor.to_device(&Device::Cpu)?;
    let codes = tensor.flatten_all()?.to_vec1::<F8E4M3>()?;
    Ok(codes.iter().map(F8E4M3::to_bits).collect())
}

/// A float tensor's values, flat.
pub(crate) fn values(tensor: &Tensor) -> Result<Vec<f64>> {
    let values = tensor
        .to_device(&Device::Cpu)?
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
