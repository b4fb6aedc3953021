//! `silu_mul` bit by bit, and the MLP on the device against its parts.

use candle_core::{DType, Device, Result, Tensor};
use candle_fp8_xpu::{
    Input, Memory, Quantization, XpuDevice, XpuWeight, gated_mlp, scaled_mm, scaled_mm_many,
    silu_mul,
};

use crate::devices::{bits, codes, everywhere, floats};
use crate::oracle::cases::Random;

#[test]
fn silu_mul_agrees_with_the_cpu() -> Result<()> {
    everywhere(|device| {
        let mut random = Random(3);
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let rows = 60;
            let gate: Vec<f32> = (0..rows * 70)
                .map(|i| match i / 70 {
                    // Any bits; else values of every magnitude, and those where the exponential ends.
                    0..10 => f32::from_bits(random.bits()),
                    row => random.signed() * 2f32.powi(row as i32 % 12 - 4) * 1.7,
                })
                .collect();
            let up: Vec<f32> = (0..rows * 70).map(|_| random.signed() * 3.0).collect();
            let (gate, up) = (
                floats(&gate, &[rows, 70], dtype)?,
                floats(&up, &[rows, 70], dtype)?,
            );
            let (found, expected) = (
                bits(&silu_mul(device, &gate, &up)?)?,
                bits(&candle_fp8::silu_mul(&gate, &up)?)?,
            );
            let values = gate.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
            for i in 0..found.len() {
                assert_eq!(found[i], expected[i], "{dtype:?}, of {:e}", values[i]);
            }
        }
        Ok(())
    })
}

fn weight(device: &XpuDevice, n: usize, k: usize, seed: u64) -> Result<XpuWeight> {
    let mut random = Random(seed);
    // Small codes: what comes out does not overflow F16.
    let values: Vec<u8> = (0..n * k).map(|_| random.bits() as u8 & 0xb7).collect();
    let scale: Vec<f32> = (0..n).map(|_| 0.01 * (1.5 + random.signed())).collect();
    let scale = Tensor::from_vec(scale, (n, 1), &Device::Cpu)?;
    XpuWeight::new(device, &codes(&values, (n, k))?, &scale, None, None)
}

#[test]
fn a_chained_mlp_is_its_parts() -> Result<()> {
    everywhere(|device| {
        let (hidden, inner) = (48, 70);
        let [gate, up] = [1, 2].map(|seed| weight(device, inner, hidden, seed));
        let (gate, up, down) = (gate?, up?, weight(device, hidden, inner, 3)?);
        for (rows, dtype, quantization) in [
            (1, DType::BF16, Some(Quantization::PerToken)),
            (5, DType::F32, Some(Quantization::PerGroup(16))),
            (20, DType::F16, None),
        ] {
            let x = Tensor::randn(0f32, 1., (2, rows, hidden), &Device::Cpu)?.to_dtype(dtype)?;
            let input = |x| {
                quantization.map_or(Input::Full(x), |quantization| {
                    Input::Quantize(x, quantization)
                })
            };
            let parts = scaled_mm_many(input(&x), &[&gate, &up])?;
            let middle = silu_mul(device, &parts[0], &parts[1])?;
            let expected = scaled_mm(input(&middle), &down)?;
            let before = device.transfers();
            let found = gated_mlp(input(&x), &gate, &up, &down, quantization)?;
            let after = device.transfers();
            assert_eq!(found.dims(), x.dims());
            assert_eq!(bits(&found)?, bits(&expected)?);
            let moved = [
                after.uploads - before.uploads,
                after.downloads - before.downloads,
                after.results_in_place - before.results_in_place,
            ];
            // One copy there, of rows that are as they should be no copy at all; and one result.
            let expected = match device.memory() {
                Memory::Copied | Memory::Mapped | Memory::Shared => [1, 1, 0],
                Memory::Tensors => [0, 0, 1],
            };
            assert_eq!(moved, expected, "{dtype:?}");
        }
        Ok(())
    })
}
