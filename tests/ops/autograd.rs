//! A backward pass that reaches an op ends in an error, not in missing gradients.

use crate::cases::codes;
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_fp8::{Input, Quantization, ScaleLayout, scaled_mm};

const TEXT: &str = "FP8 linears are not trainable; load with dequantize = true";

fn parts() -> Result<(Tensor, Tensor)> {
    let weight = codes(&[0x38; 6], (2, 3), &Device::Cpu)?;
    Ok((weight, Tensor::ones((2, 1), DType::F32, &Device::Cpu)?))
}

#[test]
fn backward_is_refused() -> Result<()> {
    let (weight, scale) = parts()?;
    let x = Var::ones((4, 3), DType::F32, &Device::Cpu)?;
    for input in [
        Input::Full(&x),
        Input::Quantize(&x, Quantization::PerToken),
        Input::Quantize(&x, Quantization::Static(1.0)),
    ] {
        let y = scaled_mm(input, &weight, &scale, ScaleLayout::Channel, None)?;
        let error = y.sum_all()?.backward().unwrap_err().to_string();
        assert!(
            error.contains(TEXT) && error.contains("scaled_mm"),
            "{error}"
        );
    }

    let y = candle_fp8::fake_quantize(&x, &Tensor::ones(1, DType::F32, &Device::Cpu)?)?;
    let error = y.sum_all()?.backward().unwrap_err().to_string();
    assert!(
        error.contains(TEXT) && error.contains("fake_quantize"),
        "{error}"
    );
    Ok(())
}

#[test]
fn gradients_of_scales_and_bias_are_refused_too() -> Result<()> {
    let (weight, scale) = parts()?;
    let x = Tensor::ones((4, 3), DType::F32, &Device::Cpu)?;
    let scale_var = Var::from_tensor(&scale)?;
    let y = scaled_mm(
        Input::Full(&x),
        &weight,
        &scale_var,
        ScaleLayout::Channel,
        None,
    )?;
    let error = y.sum_all()?.backward().unwrap_err().to_string();
    assert!(error.contains(TEXT), "{error}");

    let bias = Var::zeros(2, DType::F32, &Device::Cpu)?;
    let run = |bias: &Tensor| {
        scaled_mm(
            Input::Full(&x),
            &weight,
            &scale,
            ScaleLayout::Channel,
            Some(bias),
        )
    };
    let error = run(&bias).unwrap_err().to_string();
    assert!(error.contains(TEXT), "{error}");
    run(&bias.detach())?;
    Ok(())
}

#[test]
fn nothing_is_tracked_without_variables() -> Result<()> {
    let (weight, scale) = parts()?;
    let x = Tensor::ones((4, 3), DType::F32, &Device::Cpu)?;
    let y = scaled_mm(Input::Full(&x), &weight, &scale, ScaleLayout::Channel, None)?;
    assert!(!y.track_op());
    Ok(())
}
