//! What goes wrong is told, and leaves the device as it was.

use candle_core::{DType, Device, Result, Tensor};
use candle_fp8_xpu::{
    Error, Input, Kernels, Quantization, XpuDevice, XpuOptions, XpuWeight, quantize_per_token,
    scaled_mm,
};

use crate::devices::everywhere;

#[track_caller]
fn says<T: std::fmt::Debug>(result: Result<T>, parts: &[&str]) {
    let text = result.expect_err("should be refused").to_string();
    for part in parts {
        assert!(text.contains(part), "{part:?} is missing in {text}");
    }
}

#[test]
fn no_such_device() {
    match XpuDevice::new(1000) {
        Err(Error::NoOpenCl) => {}
        Err(error @ Error::NoDevice { .. }) => {
            assert!(error.to_string().contains("no XPU device 1000"), "{error}")
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn operands_that_do_not_fit() -> Result<()> {
    everywhere(|device| {
        let codes = Tensor::zeros((8, 32), DType::F8E4M3, &Device::Cpu)?;
        let scale = Tensor::ones((8, 1), DType::F32, &Device::Cpu)?;
        let weight = XpuWeight::new(device, &codes, &scale, None, None)?;
        let x = Tensor::zeros((2, 32), DType::F32, &Device::Cpu)?;
        says(
            XpuWeight::new(device, &x, &scale, None, None),
            &["XpuWeight::new", "weight", "F8E4M3 [N, K]"],
        );
        says(
            XpuWeight::new(device, &codes, &scale, Some((4, 4)), None),
            &["weight_scale", "[2, 8]", "[8, 1]"],
        );
        says(
            XpuWeight::new(device, &codes, &scale, Some((0, 4)), None),
            &["1x1"],
        );
        says(
            XpuWeight::new(device, &codes, &scale, None, Some(&x)),
            &["bias", "of shape [8]"],
        );
        let narrow = x.narrow(1, 0, 31)?;
        says(
            scaled_mm(Input::Full(&narrow), &weight),
            &["scaled_mm", "[.., 32]", "[2, 31]"],
        );
        says(
            scaled_mm(Input::Full(&codes), &weight),
            &["BF16, F16 or F32"],
        );
        let quantize = |quantization| scaled_mm(Input::Quantize(&x, quantization), &weight);
        says(
            quantize(Quantization::Static(0.0)),
            &["input_scale", "positive, finite"],
        );
        says(quantize(Quantization::PerGroup(0)), &["group size"]);
        Ok(())
    })
}

#[test]
fn too_little_memory() -> Result<()> {
    everywhere(|device| {
        let used = device.used_bytes();
        let n = 1 << 20;
        let codes = Tensor::zeros((n, 1), DType::F8E4M3, &Device::Cpu)?;
        let scale = Tensor::ones(1, DType::F32, &Device::Cpu)?;
        let weight = XpuWeight::new(device, &codes, &scale, None, None)?;
        // A result of 4 TiB.
        let x = Tensor::zeros((n, 1), DType::F32, &Device::Cpu)?;
        let bytes = (4u64 << 40).to_string();
        says(
            scaled_mm(Input::Full(&x), &weight),
            &["too little memory", &bytes, &device.info().name],
        );
        // And goes on with what fits.
        scaled_mm(Input::Full(&x.narrow(0, 0, 1)?), &weight)?;
        drop(weight);
        assert_eq!(device.used_bytes(), used, "what is dropped is free again");
        Ok(())
    })
}

/// The kernels for matrix units are written for subgroups of 8 and of 16 lanes.
#[test]
fn matrix_units_are_refused_on_other_lanes() {
    for (index, info) in XpuDevice::list().unwrap_or_default().iter().enumerate() {
        if !info.kernels.contains(&Kernels::Matrix) {
            continue;
        }
        for lanes in [4, 32, 64] {
            let options = XpuOptions {
                kernels: Some(Kernels::Matrix),
                lanes: Some(lanes),
                ..XpuOptions::default()
            };
            let error = XpuDevice::with_options(index, options).expect_err("refused");
            for part in ["options.lanes", &format!("is {lanes}")] {
                assert!(error.to_string().contains(part), "{part:?}: {error}");
            }
        }
    }
}

/// Kernels count in 32 bits, with room for sums of two.
#[test]
fn sizes_past_what_kernels_count() -> Result<()> {
    everywhere(|device| {
        // They take no memory.
        let many = 1usize << 31;
        let zero = Tensor::zeros((1, 1), DType::BF16, &Device::Cpu)?;
        let (tall, wide) = (zero.broadcast_as((many, 1))?, zero.broadcast_as((1, many))?);
        for x in [&tall, &wide] {
            says(
                quantize_per_token(device, x),
                &["quantize_per_token", "x", "below 2147483648", "2147483648"],
            );
        }
        let code = Tensor::zeros((1, 1), DType::F8E4M3, &Device::Cpu)?;
        let scale = Tensor::ones(1, DType::F32, &Device::Cpu)?;
        for dims in [(many, 1), (1, many)] {
            says(
                XpuWeight::new(device, &code.broadcast_as(dims)?, &scale, None, None),
                &["XpuWeight::new", "weight", "below 2147483648"],
            );
        }
        let weight = XpuWeight::new(device, &code, &scale, None, None)?;
        says(
            scaled_mm(Input::Full(&tall), &weight),
            &["scaled_mm", "x", "below 2147483648"],
        );
        Ok(())
    })
}
