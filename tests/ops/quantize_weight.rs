//! Weights to codes as compressed-tensors 0.19.0 writes them (PyTorch 2.14, CPU), frozen.
#![allow(clippy::excessive_precision)] // Frozen values stand as Python prints them.

use crate::cases::{code_bits, dtype, fnv};
use crate::devices::everywhere;
use crate::oracle::Float;
use candle_core::{DType, Device, Result, Tensor};
use candle_fp8::{Rounding, ScaleLayout, quantize_weight, weight_scale};

/// A weight `[37, 83]` that Python makes too: a row of zeros, a negative zero, rows of five magnitudes.
fn weight(float: Float) -> Result<Tensor> {
    let (n, k) = (37, 83);
    let mut state = 7u32;
    let mut values: Vec<f32> = (0..n * k)
        .map(|i| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let integer = (state >> 16) as f32 - 32768.0;
            integer * 2f32.powi(-24 + (i / k % 5) as i32 * 2)
        })
        .collect();
    values[3 * k..4 * k].fill(0.0);
    values[17 * k + 2] = -0.0;
    Tensor::from_vec(values, (n, k), &Device::Cpu)?.to_dtype(dtype(float))
}

#[test]
fn scales_and_codes_as_in_compressed_tensors() -> Result<()> {
    everywhere(|device| {
        const BLOCK: ScaleLayout = ScaleLayout::Block { rows: 16, cols: 32 };
        use Float::{Bf16, F16, F32};
        use ScaleLayout::{Channel, Tensor};
        // FNV-1a of: the scales as f32; `quantize`'s codes; the codes of one f32 division.
        #[rustfmt::skip]
    let frozen: [(Float, ScaleLayout, u64, u64, u64); 9] = [
        (Bf16, Tensor,  0x4baf_cc7f_9c90_bfb5, 0x2968_dbef_4ab2_8844, 0x062f_9abe_293b_0d66),
        (Bf16, Channel, 0x86dd_9161_a720_7f6f, 0x3111_499c_a973_23f7, 0xaaee_53cd_385a_832b),
        (Bf16, BLOCK,   0xf933_ec35_98cd_f7ec, 0x8386_564e_3b70_c74d, 0x1bfb_0c46_1be1_084e),
        (F16,  Tensor,  0x4baf_cc7f_9c90_bfb5, 0x3e4d_cd2c_3337_be00, 0x3e4d_cd2c_3337_be00),
        (F16,  Channel, 0x85db_dab6_ddbe_f55a, 0x5d2c_4490_3797_3896, 0x84db_63e4_31bf_10f6),
        (F16,  BLOCK,   0x20ba_9efc_e1fb_9244, 0x7d53_84fd_9e49_7329, 0xa69a_1c5e_18d4_e36c),
        (F32,  Tensor,  0x65f2_3140_b38a_6abb, 0x587d_7e43_3a0f_cb61, 0x587d_7e43_3a0f_cb61),
        (F32,  Channel, 0x0696_760f_872e_bad9, 0xb364_9802_bfc2_7820, 0xb364_9802_bfc2_7820),
        (F32,  BLOCK,   0x9e0d_4dc0_a1b4_2214, 0x86d6_0a59_fe36_8c8b, 0x86d6_0a59_fe36_8c8b),
    ];
        for (float, layout, scale_hash, codes_hash, once_hash) in frozen {
            let w = weight(float)?.to_device(device)?;
            let scale = weight_scale(&w, layout, dtype(float))?;
            assert_eq!(scale.dtype(), DType::F32);
            assert_eq!(scale.dims(), layout.shape(37, 83));
            let bits = scale.flatten_all()?.to_vec1::<f32>()?;
            let hash = fnv(bits.into_iter().flat_map(f32::to_le_bytes));
            assert_eq!(hash, scale_hash, "scales, {float:?} {layout:?}");
            for scale in [&scale, &scale.to_dtype(dtype(float))?] {
                for (rounding, expected) in [
                    (Rounding::ViaScaleDtype, codes_hash),
                    (Rounding::Once, once_hash),
                ] {
                    let codes = quantize_weight(&w, scale, layout, rounding)?;
                    assert_eq!(codes.dims(), [37, 83]);
                    let hash = fnv(code_bits(&codes)?);
                    assert_eq!(hash, expected, "{rounding:?}, {float:?} {layout:?}");
                }
            }
        }
        Ok(())
    })
}

#[test]
fn a_few_by_hand() -> Result<()> {
    everywhere(|device| {
        let w = Tensor::new(
            &[
                [0.1f32, -0.25, 0.337, 0.0421, -0.0007, 0.3],
                [0.0; 6],
                [1.5, -3.140625, 2.71, 0.011, -0.9, 1e-4],
            ],
            device,
        )?
        .to_dtype(DType::BF16)?;
        let scale = weight_scale(&w, ScaleLayout::Channel, DType::BF16)?;
        let expected = [[0.00075531005859375f32], [0.0078125], [0.00701904296875]];
        assert_eq!(scale.to_vec2::<f32>()?, expected);

        let twice = quantize_weight(&w, &scale, ScaleLayout::Channel, Rounding::ViaScaleDtype)?;
        #[rustfmt::skip]
    let mut expected = vec![
        0x70, 0xfa, 0x7e, 0x66, 0xb7, 0x7c,
        0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
        0x75, 0xfe, 0x7c, 0x3c, 0xf0, 0x07,
    ];
        assert_eq!(code_bits(&twice)?, expected);
        // 0.010986 / 0.007019 is just above the middle of 1.5 and 1.625; BF16 puts it on the middle, and 1.5 is even.
        let once = quantize_weight(&w, &scale, ScaleLayout::Channel, Rounding::Once)?;
        expected[15] = 0x3d;
        assert_eq!(code_bits(&once)?, expected);
        Ok(())
    })
}

#[test]
fn a_weight_of_zeros_gets_the_smallest_step() -> Result<()> {
    everywhere(|device| {
        for (dtype, eps) in [
            (DType::BF16, 0.0078125f32),
            (DType::F16, 0.0009765625),
            (DType::F32, f32::EPSILON),
        ] {
            let w = Tensor::zeros((2, 3), dtype, device)?;
            let scale = weight_scale(&w, ScaleLayout::Tensor, dtype)?;
            assert_eq!(scale.to_vec1::<f32>()?, [eps]);
        }
        Ok(())
    })
}
