//! Activations that are quantized as they are computed: what quantizing afterwards gives.

use crate::cases::{Random, code_bits, codes, floats, values};
use crate::devices::everywhere;
use candle_core::{DType, Device, Result, Tensor};
use candle_fp8::{Input, Quantization, Quantized, ScaleLayout, scaled_mm};

const QUANTIZATIONS: [Quantization; 5] = [
    Quantization::PerToken,
    Quantization::PerTensor,
    Quantization::Static(0.0113),
    Quantization::PerGroup(128),
    Quantization::PerGroup(48),
];

fn random(shape: &[usize], dtype: DType, seed: u64, device: &Device) -> Result<Tensor> {
    let mut random = Random(seed);
    let count = shape.iter().product();
    let values: Vec<f32> = (0..count).map(|_| random.signed() * 3.0).collect();
    floats(&values, shape, dtype, device)
}

fn assert_same(found: &Quantized, expected: &Quantized, what: &str) -> Result<()> {
    assert_eq!(
        code_bits(&found.codes)?,
        code_bits(&expected.codes)?,
        "{what}"
    );
    assert_eq!(values(&found.scales)?, values(&expected.scales)?, "{what}");
    assert_eq!(found.codes.dims(), expected.codes.dims(), "{what}");
    assert_eq!(found.scales.dims(), expected.scales.dims(), "{what}");
    assert_eq!(
        (found.group, found.dtype),
        (expected.group, expected.dtype),
        "{what}"
    );
    Ok(())
}

#[test]
fn norms_and_activations() -> Result<()> {
    everywhere(|device| {
        for dtype in [DType::BF16, DType::F16, DType::F32] {
            for shape in [
                vec![512],
                vec![1, 1, 2048],
                vec![3, 768],
                vec![2, 70, 256],
                vec![0, 64],
            ] {
                let [x, other] = [1, 2].map(|seed| random(&shape, dtype, seed, device));
                let (x, other) = (x?, other?);
                let weight = random(&shape[shape.len() - 1..], dtype, 3, device)?;
                for quantization in QUANTIZATIONS {
                    let what = format!("{dtype:?} {shape:?} {quantization:?}");
                    let expected = |x: &Tensor| candle_fp8::quantize(x, quantization);

                    let inner = candle_fp8::silu_mul(&x, &other)?;
                    let found = candle_fp8::silu_mul_quantize(&x, &other, quantization)?;
                    assert_same(&found, &expected(&inner)?, &what)?;

                    // On a GPU, other groups go to a kernel that adds the squares in another order.
                    if quantization == Quantization::PerGroup(48) {
                        continue;
                    }
                    let normed = candle_fp8::rms_norm(&x, &weight, 1e-5)?;
                    let found = candle_fp8::rms_norm_quantize(&x, &weight, 1e-5, quantization)?;
                    assert_same(&found, &expected(&normed)?, &what)?;

                    let (sum, normed) = candle_fp8::add_rms_norm(&x, &other, &weight, 1e-5)?;
                    let (found_sum, found) =
                        candle_fp8::add_rms_norm_quantize(&x, &other, &weight, 1e-5, quantization)?;
                    assert_eq!(values(&found_sum)?, values(&sum)?, "{what}");
                    assert_same(&found, &expected(&normed)?, &what)?;
                }
            }
        }
        Ok(())
    })
}

#[test]
fn parts_of_one_matrix() -> Result<()> {
    // Gate and up as one linear gives them: [.., 2 I].
    everywhere(|device| {
        let both = random(&[2, 3, 1024], DType::BF16, 1, device)?;
        let (gate, up) = (both.narrow(2, 0, 512)?, both.narrow(2, 512, 512)?);
        let (dense_gate, dense_up) = (gate.contiguous()?, up.contiguous()?);
        let expected = candle_fp8::silu_mul(&dense_gate, &dense_up)?;
        assert_eq!(
            values(&candle_fp8::silu_mul(&gate, &up)?)?,
            values(&expected)?
        );
        for quantization in QUANTIZATIONS {
            let found = candle_fp8::silu_mul_quantize(&gate, &up, quantization)?;
            let expected = candle_fp8::silu_mul_quantize(&dense_gate, &dense_up, quantization)?;
            assert_same(&found, &expected, "silu_mul")?;
            let found = candle_fp8::quantize(&gate, quantization)?;
            let expected = candle_fp8::quantize(&dense_gate, quantization)?;
            assert_same(&found, &expected, "quantize")?;
        }
        Ok(())
    })
}

#[test]
fn they_enter_products() -> Result<()> {
    everywhere(|device| {
        let (n, k) = (40, 256);
        let mut bytes = Random(9);
        let weight: Vec<u8> = (0..n * k).map(|_| bytes.finite_code()).collect();
        let weight = codes(&weight, (n, k), device)?;
        let scale = random(&[n, 1], DType::F32, 4, device)?;
        for rows in [1, 5] {
            let x = random(&[rows, k], DType::BF16, 1, device)?;
            for quantization in QUANTIZATIONS {
                let quantized = candle_fp8::quantize(&x, quantization)?;
                let product = |input| scaled_mm(input, &weight, &scale, ScaleLayout::Channel, None);
                let found = product(quantized.input())?;
                let expected = product(Input::Quantize(&x, quantization))?;
                assert_eq!(found.dtype(), DType::BF16);
                assert_eq!(
                    values(&found)?,
                    values(&expected)?,
                    "{rows} {quantization:?}"
                );
            }
        }
        Ok(())
    })
}

#[test]
fn what_nothing_can_be_quantized_with_is_refused() -> Result<()> {
    everywhere(|device| {
        let x = random(&[2, 64], DType::F32, 1, device)?;
        let weight = random(&[64], DType::F32, 2, device)?;
        for (quantization, words) in [
            (Quantization::Static(0.0), "a positive, finite scale"),
            (Quantization::PerGroup(0), "group size is 0"),
        ] {
            for text in [
                candle_fp8::quantize(&x, quantization).err(),
                candle_fp8::rms_norm_quantize(&x, &weight, 1e-5, quantization).err(),
                candle_fp8::add_rms_norm_quantize(&x, &x, &weight, 1e-5, quantization).err(),
                candle_fp8::silu_mul_quantize(&x, &x, quantization).err(),
            ] {
                let text = text.expect("an error").to_string();
                assert!(text.contains(words), "{text}");
            }
        }
        let half = weight.to_dtype(DType::F16)?;
        let error = candle_fp8::rms_norm_quantize(&x, &half, 1e-5, Quantization::PerToken);
        assert!(
            error
                .unwrap_err()
                .to_string()
                .contains("weight has dtype F16")
        );
        Ok(())
    })
}
