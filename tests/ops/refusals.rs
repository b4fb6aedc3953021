//! What the ops refuse, and in which words: the op, the tensor, what was expected and what was found.

use candle_core::{DType, Device, Result, Tensor};
use candle_fp8::{Input, Quantization, Rounding, ScaleLayout};

fn zeros(shape: impl Into<candle_core::Shape>, dtype: DType) -> Tensor {
    // Candle fills F8E4M3 with zeros on the CPU as it does any other type.
    Tensor::zeros(shape.into(), dtype, &Device::Cpu).unwrap()
}

#[track_caller]
fn refused<T>(result: Result<T>, words: &[&str]) {
    let text = match result {
        Ok(_) => panic!("not refused; expected {words:?}"),
        Err(error) => error.to_string(),
    };
    for word in words {
        assert!(text.contains(word), "{word:?} is missing in {text:?}");
    }
}

/// A `scaled_mm` with one part replaced.
struct Call {
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    layout: ScaleLayout,
    bias: Option<Tensor>,
    quantization: Quantization,
}

fn call() -> Call {
    Call {
        x: zeros((2, 6), DType::F32),
        weight: zeros((4, 6), DType::F8E4M3),
        scale: zeros((4, 1), DType::F32),
        layout: ScaleLayout::Channel,
        bias: None,
        quantization: Quantization::PerToken,
    }
}

impl Call {
    fn run(&self) -> Result<Tensor> {
        candle_fp8::scaled_mm(
            Input::Quantize(&self.x, self.quantization),
            &self.weight,
            &self.scale,
            self.layout,
            self.bias.as_ref(),
        )
    }

    #[track_caller]
    fn refused(&self, words: &[&str]) {
        refused(self.run(), &["scaled_mm"]);
        refused(self.run(), words);
    }
}

#[test]
fn the_call_itself_works() -> Result<()> {
    assert_eq!(call().run()?.dims(), [2, 4]);
    Ok(())
}

#[test]
fn wrong_dtypes() {
    let x = zeros((2, 6), DType::F64);
    Call { x, ..call() }.refused(&["x has dtype F64", "expected BF16, F16 or F32"]);
    let x = zeros((2, 6), DType::F8E4M3);
    Call { x, ..call() }.refused(&["x has dtype F8E4M3"]);
    let weight = zeros((4, 6), DType::BF16);
    Call { weight, ..call() }.refused(&["weight has dtype BF16", "expected F8E4M3"]);
    let scale = zeros((4, 1), DType::BF16);
    Call { scale, ..call() }.refused(&["weight_scale has dtype BF16", "expected F32"]);
    let bias = Some(zeros(4, DType::U32));
    Call { bias, ..call() }.refused(&["bias has dtype U32"]);
}

#[test]
fn wrong_shapes() {
    let x = zeros((2, 5), DType::F32);
    Call { x, ..call() }.refused(&["x has shape [2, 5]", "[.., 6] for a weight [4, 6]"]);
    let x = zeros((), DType::F32);
    Call { x, ..call() }.refused(&["x has shape []", "[.., K]"]);
    let weight = zeros(24, DType::F8E4M3);
    Call { weight, ..call() }.refused(&["weight has shape [24]", "[N, K]"]);
    let weight = zeros((4, 0), DType::F8E4M3);
    Call { weight, ..call() }.refused(&["weight has shape [4, 0]"]);
    for shape in [vec![4], vec![1, 4], vec![5, 1], vec![4, 6], vec![]] {
        let scale = zeros(shape.clone(), DType::F32);
        let found = format!("weight_scale has shape {shape:?}");
        let words = [&found, "[4, 1]", "each row of the weight [4, 6]"];
        Call { scale, ..call() }.refused(&words);
    }
    let (layout, scale) = (ScaleLayout::Tensor, zeros((), DType::F32));
    let words = ["weight_scale has shape []", "[1]", "whole weight"];
    #[rustfmt::skip]
    Call { scale, layout, ..call() }.refused(&words);
    let layout = ScaleLayout::Block { rows: 2, cols: 4 };
    let words = ["weight_scale has shape [4, 1]", "[2, 2]", "each 2x4 block"];
    Call { layout, ..call() }.refused(&words);
    let bias = Some(zeros(6, DType::F32));
    Call { bias, ..call() }.refused(&["bias has shape [6]", "[4]"]);
}

#[test]
fn wrong_values() {
    let layout = ScaleLayout::Block { rows: 0, cols: 4 };
    Call { layout, ..call() }.refused(&["block structure is 0x4", "at least 1x1"]);
    let quantization = Quantization::PerGroup(0);
    #[rustfmt::skip]
    Call { quantization, ..call() }.refused(&["group size is 0"]);
    for scale in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let quantization = Quantization::Static(scale);
        let words = [&format!("input_scale is {scale}")[..], "positive, finite"];
        #[rustfmt::skip]
        Call { quantization, ..call() }.refused(&words);
    }
    let weight = zeros((6, 4), DType::F8E4M3).t().unwrap();
    Call { weight, ..call() }.refused(&["weight is strided [1, 4]", "contiguous"]);
}

#[test]
fn wrong_codes_input() {
    let call = call();
    let codes = zeros((2, 6), DType::F8E4M3);
    let run = |codes: &Tensor, scales: &Tensor, group, dtype| {
        let input = Input::Codes {
            codes,
            scales,
            group,
            dtype,
        };
        candle_fp8::scaled_mm(input, &call.weight, &call.scale, call.layout, None)
    };
    let token = zeros((2, 1), DType::F32);
    assert!(run(&codes, &token, None, DType::BF16).is_ok());
    assert!(run(&codes, &zeros(1, DType::F32), None, DType::F32).is_ok());
    assert!(run(&codes, &zeros((2, 2), DType::F32), Some(4), DType::F32).is_ok());

    refused(
        run(&call.x, &token, None, DType::F32),
        &["scaled_mm", "x has dtype F32", "expected F8E4M3"],
    );
    refused(
        run(&codes, &token, None, DType::U8),
        &["scaled_mm", "the result has dtype U8"],
    );
    refused(
        run(&codes, &zeros((2, 1), DType::BF16), None, DType::F32),
        &["scaled_mm", "x_scale has dtype BF16"],
    );
    for (scales, group) in [
        (zeros(2, DType::F32), None),
        (zeros((1, 2), DType::F32), None),
        (zeros((2, 1), DType::F32), Some(4)),
        (zeros(1, DType::F32), Some(4)),
    ] {
        refused(
            run(&codes, &scales, group, DType::F32),
            &["scaled_mm", "x_scale has shape", "expected [2, "],
        );
    }
    refused(
        run(&codes, &token, Some(0), DType::F32),
        &["scaled_mm", "group size is 0"],
    );
}

#[test]
fn quantizers() {
    let x = zeros((2, 6), DType::U8);
    refused(
        candle_fp8::quantize_per_token(&x),
        &["quantize_per_token", "x has dtype U8"],
    );
    refused(
        candle_fp8::quantize_per_tensor(&x),
        &["quantize_per_tensor", "x has dtype U8"],
    );
    refused(
        candle_fp8::quantize_per_group(&x, 2),
        &["quantize_per_group", "x has dtype U8"],
    );
    refused(
        candle_fp8::quantize_static(&x, 1.0),
        &["quantize_static", "x has dtype U8"],
    );
    let x = zeros((2, 6), DType::BF16);
    refused(
        candle_fp8::quantize_static(&x, f32::NAN),
        &["quantize_static", "scale is NaN"],
    );
    refused(
        candle_fp8::quantize_per_group(&x, 0),
        &["quantize_per_group", "group size is 0"],
    );
    refused(
        candle_fp8::quantize_per_token(&zeros((2, 0), DType::F32)),
        &["quantize_per_token", "x has shape [2, 0]"],
    );
    refused(
        candle_fp8::fake_quantize(&x, &zeros(1, DType::BF16)),
        &["fake_quantize", "scale has dtype BF16"],
    );
    refused(
        candle_fp8::fake_quantize(&x, &zeros(4, DType::F32)),
        &["fake_quantize", "scale has shape [4]", "[2, 6]"],
    );
}

#[test]
fn weights() {
    let codes = zeros((4, 6), DType::F8E4M3);
    let scale = zeros((4, 1), DType::F32);
    let dequantize = |codes: &Tensor, scale: &Tensor, scale_dtype, dtype| {
        candle_fp8::dequantize(codes, scale, ScaleLayout::Channel, scale_dtype, dtype)
    };
    assert!(dequantize(&codes, &scale, DType::BF16, DType::F32).is_ok());
    refused(
        dequantize(&scale, &scale, DType::BF16, DType::F32),
        &["dequantize", "codes has dtype F32", "expected F8E4M3"],
    );
    refused(
        dequantize(&codes, &zeros((4, 1), DType::F16), DType::BF16, DType::F32),
        &["dequantize", "weight_scale has dtype F16"],
    );
    refused(
        dequantize(&codes, &scale, DType::F64, DType::F32),
        &["dequantize", "scale_dtype has dtype F64"],
    );
    refused(
        dequantize(&codes, &scale, DType::F32, DType::U8),
        &["dequantize", "the result has dtype U8"],
    );
    refused(
        dequantize(&codes, &zeros((6, 1), DType::F32), DType::F32, DType::F32),
        &["dequantize", "weight_scale has shape [6, 1]", "[4, 1]"],
    );

    let w = zeros((4, 6), DType::BF16);
    let block = ScaleLayout::Block { rows: 2, cols: 0 };
    refused(
        candle_fp8::weight_scale(&w, block, DType::BF16),
        &["weight_scale", "block structure is 2x0"],
    );
    refused(
        candle_fp8::weight_scale(&codes, ScaleLayout::Tensor, DType::BF16),
        &["weight_scale", "w has dtype F8E4M3"],
    );
    refused(
        candle_fp8::weight_scale(&zeros(6, DType::F32), ScaleLayout::Tensor, DType::F32),
        &["weight_scale", "w has shape [6]"],
    );
    refused(
        candle_fp8::quantize_weight(&w, &scale, ScaleLayout::Tensor, Rounding::Once),
        &["quantize_weight", "weight_scale has shape [4, 1]", "[1]"],
    );
    refused(
        candle_fp8::quantize_weight(
            &w,
            &zeros((4, 1), DType::F16),
            ScaleLayout::Channel,
            Rounding::Once,
        ),
        &["quantize_weight", "weight_scale has dtype F16"],
    );
}
