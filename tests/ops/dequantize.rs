//! Dequantization, bit for bit.
#![allow(clippy::excessive_precision)] // Frozen values stand as Python prints them.

use crate::cases::{Random, codes, dtype, fnv, layout, values};
use crate::devices::everywhere;
use crate::oracle::{self, Float, Layout};
use candle_core::{DType, Device, Result, Tensor};
use candle_fp8::ScaleLayout;
use half::{bf16, f16};

const FLOATS: [Float; 3] = [Float::Bf16, Float::F16, Float::F32];

/// Bits of a float tensor as bytes, little endian, with every NaN as the one canonical NaN.
fn bytes(tensor: &Tensor) -> Result<Vec<u8>> {
    let tensor = tensor.to_device(&Device::Cpu)?.flatten_all()?;
    Ok(match tensor.dtype() {
        DType::BF16 => {
            let values = tensor.to_vec1::<bf16>()?.into_iter();
            let bits = values.map(|v| if v.is_nan() { 0x7fc0 } else { v.to_bits() });
            bits.flat_map(u16::to_le_bytes).collect()
        }
        DType::F16 => {
            let values = tensor.to_vec1::<f16>()?.into_iter();
            let bits = values.map(|v| if v.is_nan() { 0x7e00 } else { v.to_bits() });
            bits.flat_map(u16::to_le_bytes).collect()
        }
        _ => {
            let values = tensor.to_vec1::<f32>()?.into_iter();
            let bits = values.map(|v| if v.is_nan() { 0x7fc0_0000 } else { v.to_bits() });
            bits.flat_map(u32::to_le_bytes).collect()
        }
    })
}

/// Every code under scales spread over all positive finite values of a type: codes `[S, 256]`, scales `[S, 1]`.
fn every_code(scale_type: Float, device: &Device) -> Result<(Tensor, Tensor)> {
    let scales = match scale_type {
        Float::Bf16 => {
            let scales: Vec<bf16> = (1..0x7f80).step_by(211).map(bf16::from_bits).collect();
            Tensor::new(scales, device)?
        }
        Float::F16 => {
            let scales: Vec<f16> = (1..0x7c00).step_by(211).map(f16::from_bits).collect();
            Tensor::new(scales, device)?
        }
        Float::F32 => {
            let bits = (1..0x7f80_0000u32).step_by(13_835_057);
            let scales: Vec<f32> = bits.map(f32::from_bits).collect();
            Tensor::new(scales, device)?
        }
    };
    let s = scales.dim(0)?;
    let all: Vec<u8> = (0..s).flat_map(|_| 0..=255u8).collect();
    Ok((codes(&all, (s, 256), device)?, scales.reshape((s, 1))?))
}

#[test]
fn every_code_as_in_compressed_tensors() -> Result<()> {
    everywhere(|device| {
        // FNV-1a over the bits of compressed-tensors 0.19.0's `dequantize` (PyTorch 2.14, CPU) on `every_code`, then
        // `.to(result dtype)`.
        let frozen = [
            (Float::Bf16, Float::Bf16, 0x7842_d2a7_9f5d_73fd),
            (Float::Bf16, Float::F16, 0x0a53_c2a8_7534_6645),
            (Float::Bf16, Float::F32, 0x4da3_e0b7_f75d_6d4d),
            (Float::F16, Float::Bf16, 0xc97c_9b4c_b484_fe51),
            (Float::F16, Float::F16, 0x3356_a469_06bd_5f59),
            (Float::F16, Float::F32, 0x38ac_5a23_7490_1379),
            (Float::F32, Float::Bf16, 0x5692_518a_5450_dab5),
            (Float::F32, Float::F16, 0xdd40_5cd5_d376_f619),
            (Float::F32, Float::F32, 0x7a26_c7f1_43a2_bb81),
        ];
        for (scale_type, result, expected) in frozen {
            let (codes, scales) = every_code(scale_type, device)?;
            for scales in [&scales, &scales.to_dtype(DType::F32)?] {
                let dense = candle_fp8::dequantize(
                    &codes,
                    scales,
                    ScaleLayout::Channel,
                    dtype(scale_type),
                    dtype(result),
                )?;
                assert_eq!(dense.dtype(), dtype(result));
                assert_eq!(
                    fnv(bytes(&dense)?),
                    expected,
                    "{scale_type:?} to {result:?}"
                );
            }
        }
        Ok(())
    })
}

#[test]
fn a_few_by_hand() -> Result<()> {
    everywhere(|device| {
        // The same functions on codes of 2^-9, 1.125, -3.25 and 448, in BF16, F16 (448 · 300 overflows) and F32.
        let all = codes(&[0x01, 0x39, 0xc5, 0x7e].repeat(2), (2, 4), device)?;
        let scales = Tensor::new(&[[1.7f32], [300.0]], device)?;
        let frozen = [
            (
                DType::BF16,
                [0.003326416015625, 1.9140625, -5.53125, 764.0],
                [0.5859375, 338.0, -976.0, 134144.0],
            ),
            (
                DType::F16,
                [0.0033206939697265625, 1.9130859375, -5.52734375, 761.5],
                [0.5859375, 337.5, -975.0, f32::INFINITY],
            ),
            (
                DType::F32,
                [
                    0.0033203125931322575,
                    1.912500023841858,
                    -5.525000095367432,
                    761.6000366210938,
                ],
                [0.5859375, 337.5, -975.0, 134400.0],
            ),
        ];
        for (scale_dtype, first, second) in frozen {
            let scales = scales.to_dtype(scale_dtype)?;
            let dense = candle_fp8::dequantize(
                &all,
                &scales,
                ScaleLayout::Channel,
                scale_dtype,
                DType::F32,
            )?;
            assert_eq!(dense.to_vec2::<f32>()?, [first, second]);
        }
        Ok(())
    })
}

#[test]
fn every_layout_and_dtype_is_exact() -> Result<()> {
    everywhere(|device| {
        let mut random = Random(3);
        // 70 000 weights: more than one task of the kernel.
        for (n, k) in [(37, 53), (700, 100)] {
            let weight: Vec<u8> = (0..n * k).map(|_| random.finite_code()).collect();
            for grid in [
                Layout::Tensor,
                Layout::Channel,
                Layout::Block(16, 24),
                Layout::Block(128, 128),
                Layout::Block(1, 7),
            ] {
                for scale_type in FLOATS {
                    let (rows, cols) = grid.grid(n, k);
                    let scales: Vec<f32> = (0..rows * cols)
                        .map(|_| {
                            let scale =
                                2f32.powi(-(random.bits() as i32 & 7)) * random.signed().abs();
                            scale_type.round(f64::from(scale)) as f32
                        })
                        .collect();
                    let layout = layout(grid);
                    let codes = codes(&weight, (n, k), device)?;
                    let scale = Tensor::from_slice(&scales, layout.shape(n, k), device)?;
                    for result in FLOATS {
                        let dense = candle_fp8::dequantize(
                            &codes,
                            &scale,
                            layout,
                            dtype(scale_type),
                            dtype(result),
                        )?;
                        let expected =
                            oracle::dequantize(&weight, k, &scales, grid, scale_type, result);
                        assert_eq!(
                            values(&dense)?,
                            expected,
                            "{grid:?} {scale_type:?} {result:?}"
                        );
                    }
                }
            }
        }
        Ok(())
    })
}

#[test]
fn takes_codes_in_any_layout() -> Result<()> {
    everywhere(|device| {
        let weight: Vec<u8> = (0..12).map(|i| 0x30 + i).collect();
        // Candle cannot copy strided codes on a GPU.
        let transposed = codes(&weight, (3, 4), device)?.t()?;
        let dense = codes(&weight, (3, 4), &Device::Cpu)?.t()?.contiguous()?;
        let scale = Tensor::new(&[[1f32], [2.], [4.], [8.]], device)?;
        let dequantize = |codes: &Tensor| {
            candle_fp8::dequantize(codes, &scale, ScaleLayout::Channel, DType::F32, DType::F32)
        };
        let expected = dequantize(&dense.to_device(device)?)?;
        assert_eq!(
            dequantize(&transposed)?.to_vec2::<f32>()?,
            expected.to_vec2::<f32>()?
        );
        Ok(())
    })
}

#[test]
fn bytes_give_the_same_as_a_tensor() -> Result<()> {
    everywhere(|device| {
        let mut random = Random(5);
        let (n, k) = (37, 53);
        let weight: Vec<u8> = (0..n * k).map(|_| random.finite_code()).collect();
        let layout = ScaleLayout::Block { rows: 16, cols: 24 };
        let scales: Vec<f32> = (0..layout.len(n, k))
            .map(|i| bf16::from_f32(random.signed() + i as f32).to_f32())
            .collect();
        let from_bytes = |codes: &[u8], scales: &[f32], dtype| {
            let (shape, scale_dtype) = ((n, k), DType::BF16);
            candle_fp8::dequantize_bytes(codes, shape, scales, layout, scale_dtype, dtype, device)
        };
        let codes = codes(&weight, (n, k), device)?;
        let scale = Tensor::from_slice(&scales, layout.shape(n, k), device)?;
        for dtype in [DType::BF16, DType::F16, DType::F32] {
            let expected = candle_fp8::dequantize(&codes, &scale, layout, DType::BF16, dtype)?;
            let found = from_bytes(&weight, &scales, dtype)?;
            assert_eq!((found.dims(), found.dtype()), (&[n, k][..], dtype));
            assert_eq!(bytes(&found)?, bytes(&expected)?);
        }

        let refused = |result: Result<Tensor>, words: &str| {
            let text = result.unwrap_err().to_string();
            assert!(
                text.contains("dequantize: ") && text.contains(words),
                "{text}"
            );
        };
        let short = from_bytes(&weight[1..], &scales, DType::F32);
        refused(short, "codes has shape [1960], expected 1961 elements");
        let short = from_bytes(&weight, &scales[1..], DType::F32);
        refused(short, "weight_scale has shape [8], expected 9 elements");
        refused(
            from_bytes(&weight, &scales, DType::I64),
            "the result has dtype I64",
        );
        Ok(())
    })
}
