//! The devices that ops are tested on, and tensors for them.

use std::sync::{Mutex, OnceLock, PoisonError};

use candle_core::{DType, Device, Result, Tensor};
use candle_fp8_xpu::{Error, Kernels, XpuDevice, XpuOptions};
use float8::F8E4M3;

use crate::oracle::Float;

/// Runs a test on every device in every way that it can be used; nothing where there is no OpenCL.
pub(crate) fn everywhere(test: impl Fn(&XpuDevice) -> Result<()>) -> Result<()> {
    // Kernels are compiled once for all tests. One at a time has a device, and looks at its counters.
    static WAYS: OnceLock<Vec<Mutex<XpuDevice>>> = OnceLock::new();
    for device in WAYS.get_or_init(|| ways().into_iter().map(Mutex::new).collect()) {
        let device = &*device.lock().unwrap_or_else(PoisonError::into_inner);
        // Seen where the test fails.
        println!(
            "on {device:?}: {:?}, {:?}",
            device.kernels(),
            device.memory()
        );
        test(device)?;
    }
    Ok(())
}

/// Every device with each of its kernels, and each other of its kinds of memory with the first of those.
fn ways() -> Vec<XpuDevice> {
    use std::io::Write;

    let infos = match XpuDevice::list() {
        Ok(infos) => infos,
        Err(Error::NoOpenCl) => Vec::new(),
        Err(error) => panic!("{error}"),
    };
    // Past what captures the output of tests. If it cannot be said, the tests are as good.
    let mut told = std::io::stderr();
    if infos.is_empty() {
        let _ = writeln!(told, "SKIPPED: no OpenCL device");
    }
    let mut ways = Vec::new();
    for (index, info) in infos.iter().enumerate() {
        // In one piece, as tests of other threads write as well.
        let line = format!(
            "TESTED: {} with kernels {:?} and memory {:?}\n",
            info.name, info.kernels, info.memories
        );
        let _ = told.write_all(line.as_bytes());
        let mut options = Vec::new();
        for &kernels in &info.kernels {
            // Matrix units of subgroups of 8, as Arc A has them, and of 16, as later GPUs do.
            let lanes = if kernels == Kernels::Matrix && !info.is_gpu {
                vec![Some(8), Some(16)]
            } else {
                vec![None]
            };
            options.extend(lanes.into_iter().map(|lanes| XpuOptions {
                kernels: Some(kernels),
                lanes,
                ..XpuOptions::default()
            }));
        }
        let first = options[0];
        // The last is what was taken above.
        options.extend(
            info.memories
                .iter()
                .rev()
                .skip(1)
                .map(|&memory| XpuOptions {
                    memory: Some(memory),
                    ..first
                }),
        );
        ways.extend(
            options
                .into_iter()
                .map(|options| XpuDevice::with_options(index, options).expect("what it can do")),
        );
    }
    ways
}

pub(crate) fn dtype(float: Float) -> DType {
    match float {
        Float::Bf16 => DType::BF16,
        Float::F16 => DType::F16,
        Float::F32 => DType::F32,
    }
}

/// A float tensor.
pub(crate) fn floats(values: &[f32], shape: &[usize], dtype: DType) -> Result<Tensor> {
    Tensor::from_slice(values, shape, &Device::Cpu)?.to_dtype(dtype)
}

/// An F8E4M3 tensor of codes.
pub(crate) fn codes(codes: &[u8], shape: (usize, usize)) -> Result<Tensor> {
    let codes: Vec<F8E4M3> = codes.iter().map(|&code| F8E4M3::from_bits(code)).collect();
    Tensor::from_vec(codes, shape, &Device::Cpu)
}

/// The bits of a tensor of codes or floats, all NaNs the same.
pub(crate) fn bits(tensor: &Tensor) -> Result<Vec<u32>> {
    if tensor.dtype() == DType::F8E4M3 {
        let codes = tensor.flatten_all()?.to_vec1::<F8E4M3>()?;
        let same = |code: u8| if code & 0x7f == 0x7f { 0x7f } else { code };
        return Ok(codes
            .iter()
            .map(|code| u32::from(same(code.to_bits())))
            .collect());
    }
    let values = tensor
        .to_dtype(DType::F32)?
        .flatten_all()?
        .to_vec1::<f32>()?;
    Ok(values
        .iter()
        .map(|value| {
            if value.is_nan() {
                u32::MAX
            } else {
                value.to_bits()
            }
        })
        .collect())
}
