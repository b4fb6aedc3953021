//! Where and in what precision a model runs.

use anyhow::Context;
use candle_core::{DType, Device};
use clap::{Args, ValueEnum};

/// The device that an example runs on: the CPU when asked for it, else the first CUDA or Metal device of a build that has
/// one, else the CPU.
///
/// # Errors
/// There is such a device, and it cannot be opened.
pub fn device(cpu: bool) -> anyhow::Result<Device> {
    if cpu {
        return Ok(Device::Cpu);
    }
    if candle_core::utils::cuda_is_available() {
        let device = Device::new_cuda(0)
            .context("cannot open the first NVIDIA GPU; --cpu does without one")?;
        // Every token is waited for: the memory of one pass should be there for the next.
        candle_fp8::keep_freed_memory(&device)?;
        // One stream does everything, in order: events for each tensor, which others would wait for, are of no use.
        #[cfg(feature = "cuda")]
        if let Device::Cuda(cuda) = &device {
            // SAFETY: examples use the device from one thread, and so from one stream.
            unsafe { cuda.disable_event_tracking() };
        }
        return Ok(device);
    }
    if candle_core::utils::metal_is_available() {
        return Device::new_metal(0)
            .context("cannot open the first Metal GPU; --cpu does without one");
    }
    Ok(Device::Cpu)
}

/// The flags `--dtype`, `--cpu` and `--xpu`.
#[derive(Args, Debug, Clone, Default)]
#[command(next_help_heading = "Device")]
pub struct DeviceArgs {
    /// What is computed in: activations, norms, KV cache, and experts once merged. [default: f32 on a CPU,
    /// where it costs nothing but memory for the KV cache; bf16 elsewhere]
    #[arg(long, value_enum, value_name = "DTYPE")]
    pub dtype: Option<Dtype>,

    /// Run on the CPU, even in a build with support for a GPU.
    #[arg(long)]
    pub cpu: bool,

    /// Run FP8 linears on an Intel GPU, through OpenCL, and the rest on the CPU: the first device, or the one of this
    /// number.
    #[arg(long, value_name = "INDEX", num_args = 0..=1, default_missing_value = "0", conflicts_with = "cpu")]
    pub xpu: Option<usize>,
}

impl DeviceArgs {
    /// The device of tensors.
    ///
    /// # Errors
    /// Those of [`device`](fn@device), and `--xpu` in a build without the feature `xpu`.
    pub fn device(&self) -> anyhow::Result<Device> {
        self.check()?;
        device(self.cpu || self.xpu.is_some())
    }

    /// Refuses `--xpu` in a build without the feature `xpu`.
    ///
    /// # Errors
    /// That it is missing.
    pub fn check(&self) -> anyhow::Result<()> {
        anyhow::ensure!(
            self.xpu.is_none() || cfg!(feature = "xpu"),
            "this was built without the feature `xpu`: add --features xpu, which needs nothing installed to build"
        );
        Ok(())
    }

    /// The device of FP8 linears, if `--xpu` asks for one.
    ///
    /// # Errors
    /// There is no such device.
    #[cfg(feature = "xpu")]
    pub fn xpu_device(&self) -> anyhow::Result<Option<candle_compressed_tensors::xpu::XpuDevice>> {
        let device = self.xpu.map(candle_compressed_tensors::xpu::XpuDevice::new);
        Ok(device.transpose()?)
    }

    /// The dtype on `device`: the one asked for, else F32 on a CPU and BF16 elsewhere.
    ///
    /// F32 is the most exact dtype on a CPU, and as fast as BF16 unless contexts are long: the KV cache takes twice the memory.
    /// Weights take what they take in the checkpoint, one byte a parameter in FP8 and two in BF16.
    pub fn dtype(&self, device: &Device) -> DType {
        match self.dtype {
            Some(Dtype::F32) => DType::F32,
            Some(Dtype::Bf16) => DType::BF16,
            Some(Dtype::F16) => DType::F16,
            None if device.is_cpu() => DType::F32,
            None => DType::BF16,
        }
    }
}

/// The values of `--dtype`.
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    /// 32-bit floating point.
    F32,
    /// bfloat16: the range of f32 with 8 bits of precision.
    Bf16,
    /// 16-bit floating point: 11 bits of precision, and nothing above 65504.
    F16,
}
