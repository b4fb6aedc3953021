//! What a linear launches, one kernel after the other, over the case table: activations are quantized by a kernel, and
//! what it gives is multiplied by another. Codes, scales and dense weights are the oracle's to the bit.

use candle_kernels_fp8::metal::{
    self, Activations, Dequantize, Float, Quantization, Quantize, QuantizeTensor, ScaledMm,
    Scaling, TENSOR_SCALES, padded,
};

use crate::emulator::Emulator;
use crate::oracle::cases::{Case, Data, table};
use crate::oracle::{self, Mode};
use crate::values::{
    FLOATS, POISON, assert_same, assert_same_codes, float_of, from_bytes, layout_of, oracle_float,
    to_bytes, widen,
};

/// The op's result, on activations that a kernel quantizes.
fn linear(device: &Emulator, case: &Case, data: &Data) -> Vec<f64> {
    let (m, n, k, float) = (case.m(), case.n, case.k, float_of(case.float));
    let x = device.upload(&to_bytes(&data.x, float));
    // Rows of codes as the op has them: each starts at a multiple of 16 bytes.
    let codes_stride = padded(k);
    let codes = device.upload(&vec![POISON; m * codes_stride]);
    let count = match case.mode {
        Mode::Group(group) => m * k.div_ceil(group),
        Mode::Tensor => TENSOR_SCALES,
        _ => m.max(1),
    };
    let scales = device.upload(&vec![POISON; count * 4]);
    let given = scales.slice();
    let how = match case.mode {
        Mode::Full | Mode::Tensor => None,
        Mode::Token => Some((Quantization::Token { scales: given }, Scaling::Token)),
        Mode::Static(scale) => {
            let scales = given;
            Some((Quantization::Static { scale, scales }, Scaling::Tensor))
        }
        Mode::Group(group) => {
            let scales = given;
            let quantization = Quantization::Group { group, scales };
            Some((quantization, Scaling::Group(group)))
        }
    };
    let (activations, row_stride) = match (case.mode, how) {
        (Mode::Full, _) => {
            let values = x.slice();
            (Activations::Values { values, float }, k)
        }
        (_, Some((quantization, scaling))) => {
            let args = Quantize {
                m,
                k,
                x: x.slice(),
                float,
                row_stride: k,
                codes: codes.slice(),
                codes_stride,
                quantization,
            };
            metal::quantize(device, &args).unwrap();
            let (codes, scales) = (codes.slice(), given);
            let activations = Activations::Codes {
                codes,
                scales,
                scaling,
            };
            (activations, codes_stride)
        }
        (_, None) => {
            let args = QuantizeTensor {
                m,
                k,
                x: x.slice(),
                float,
                row_stride: k,
                codes: codes.slice(),
                codes_stride,
                scales: given,
            };
            metal::quantize_tensor(device, &args).unwrap();
            let activations = Activations::Codes {
                codes: codes.slice(),
                scales: given.after((TENSOR_SCALES - 1) * 4),
                scaling: Scaling::Tensor,
            };
            (activations, codes_stride)
        }
    };
    if case.mode != Mode::Full {
        let expected = oracle::quantize(&widen(&data.x), k, case.mode);
        let rows = device.download(&codes);
        let found: Vec<u8> = rows
            .chunks(codes_stride)
            .flat_map(|row| row[..k].to_vec())
            .collect();
        assert_same_codes(&found, &expected.codes, &format!("{case:?}"));
        let found = from_bytes(&device.download(&scales), Float::F32);
        for (i, &expected) in expected.scales.iter().enumerate() {
            let (row, col) = (i / k, i % k);
            let found = match case.mode {
                Mode::Token => found[row],
                Mode::Group(group) => found[row * k.div_ceil(group) + col / group],
                Mode::Tensor => found[TENSOR_SCALES - 1],
                _ => found[0],
            };
            assert_eq!(
                f64::from(found),
                expected,
                "{case:?}: scale of {row}, {col}"
            );
        }
    }
    let weight = device.upload(&data.weight);
    let weight_scales = device.upload(&to_bytes(&data.scales, Float::F32));
    let bias = device.upload(&to_bytes(&data.bias, float));
    let out = device.upload(&vec![POISON; m * n * float.size()]);
    let args = ScaledMm {
        m,
        n,
        k,
        activations,
        row_stride,
        weight: weight.slice(),
        weight_stride: k,
        weight_scales: weight_scales.slice(),
        layout: layout_of(case.layout),
        bias: case.bias.then(|| (bias.slice(), float)),
        out: out.slice(),
        out_float: float,
    };
    metal::scaled_mm(device, &args).unwrap();
    let found = from_bytes(&device.download(&out), float);
    device.clear();
    widen(&found)
}

#[test]
fn linears() {
    let Some(device) = Emulator::get() else {
        return;
    };
    for case in table() {
        let data = case.data();
        let found = linear(&device, &case, &data);
        let expected = case.expected(&data);
        assert_eq!(
            expected.check(&found, case.k, case.float),
            Ok(()),
            "{case:?}"
        );
    }
}

#[test]
fn dense_weights() {
    let Some(device) = Emulator::get() else {
        return;
    };
    for case in table() {
        let data = case.data();
        let (n, k) = (case.n, case.k);
        let codes = device.upload(&data.weight);
        for scale_float in FLOATS {
            let scale_type = oracle_float(scale_float);
            let scales = data.scales.iter();
            let scales: Vec<f32> = scales
                .map(|&scale| scale_type.round(f64::from(scale)) as f32)
                .collect();
            let device_scales = device.upload(&to_bytes(&scales, Float::F32));
            for out_float in FLOATS {
                let out = device.upload(&vec![POISON; n * k * out_float.size()]);
                let args = Dequantize {
                    n,
                    k,
                    codes: codes.slice(),
                    codes_stride: k,
                    scales: device_scales.slice(),
                    layout: layout_of(case.layout),
                    scale_float,
                    out: out.slice(),
                    out_float,
                };
                metal::dequantize(&device, &args).unwrap();
                let found = from_bytes(&device.download(&out), out_float);
                let out_type = oracle_float(out_float);
                let expected =
                    oracle::dequantize(&data.weight, k, &scales, case.layout, scale_type, out_type);
                let expected: Vec<f32> = expected.into_iter().map(|value| value as f32).collect();
                assert_same(&found, &expected, &format!("{case:?}"));
            }
        }
        device.clear();
    }
}
