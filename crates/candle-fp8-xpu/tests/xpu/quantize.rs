//! The quantizers, bit by bit.

use candle_core::{DType, Result, Tensor};

use crate::devices::{bits, dtype, everywhere, floats};
use crate::oracle::cases::{Random, table};

fn agrees(device: &candle_fp8_xpu::XpuDevice, x: &Tensor) -> Result<()> {
    let same = |found: &Tensor, expected: &Tensor, what: &str| -> Result<()> {
        assert_eq!(
            (found.dims(), found.dtype()),
            (expected.dims(), expected.dtype()),
            "{what}"
        );
        let (found, expected) = (bits(found)?, bits(expected)?);
        let different = (0..found.len()).find(|&i| found[i] != expected[i]);
        if let Some(i) = different {
            let value = x
                .to_dtype(DType::F32)?
                .flatten_all()?
                .to_vec1::<f32>()?
                .get(i)
                .copied();
            panic!(
                "{what}, {:?}: element {i} is {:#x}, expected {:#x}; x is {value:?}",
                x.shape(),
                found[i],
                expected[i]
            );
        }
        Ok(())
    };
    let pair = |found: (Tensor, Tensor), expected: (Tensor, Tensor), what: &str| -> Result<()> {
        same(&found.1, &expected.1, &format!("scales, {what}"))?;
        same(&found.0, &expected.0, &format!("codes, {what}"))
    };
    use candle_fp8 as cpu;
    use candle_fp8_xpu as xpu;
    pair(
        xpu::quantize_per_token(device, x)?,
        cpu::quantize_per_token(x)?,
        "per token",
    )?;
    pair(
        xpu::quantize_per_tensor(device, x)?,
        cpu::quantize_per_tensor(x)?,
        "per tensor",
    )?;
    for group in [1, 7, 16, 128, 1 << 20] {
        let found = xpu::quantize_per_group(device, x, group)?;
        pair(
            found,
            cpu::quantize_per_group(x, group)?,
            &format!("groups of {group}"),
        )?;
    }
    for scale in [
        0.011,
        2f32.powi(-100),
        2f32.powi(110),
        f32::MIN_POSITIVE,
        f32::MAX,
    ] {
        same(
            &xpu::quantize_static(device, x, scale)?,
            &cpu::quantize_static(x, scale)?,
            &format!("static {scale:e}"),
        )?;
    }
    Ok(())
}

#[test]
fn agrees_with_the_cpu_on_the_case_table() -> Result<()> {
    everywhere(|device| {
        for case in table() {
            let shape = [&case.lead[..], &[case.k]].concat();
            let x = floats(&case.data().x, &shape, dtype(case.float))?;
            agrees(device, &x)?;
            if case.m() > 1 && shape.len() == 2 {
                agrees(device, &x.t()?)?;
            }
        }
        Ok(())
    })
}

#[test]
fn agrees_with_the_cpu_on_any_bits() -> Result<()> {
    everywhere(|device| {
        let mut random = Random(7);
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            // Rows of any bits, NaN and infinity among them, and rows of one magnitude each, from the smallest to the
            // largest.
            let any: Vec<f32> = (0..40 * 96)
                .map(|_| f32::from_bits(random.bits()))
                .collect();
            agrees(device, &floats(&any, &[40, 96], dtype)?)?;
            let rows = (-149..128).step_by(3);
            let count = rows.clone().count();
            let scaled: Vec<f32> = rows
                .flat_map(|power| {
                    let mut random = Random(power as u64);
                    (0..64).map(move |_| (f64::from(random.signed()) * 2f64.powi(power)) as f32)
                })
                .collect();
            agrees(device, &floats(&scaled, &[count, 64], dtype)?)?;
        }
        Ok(())
    })
}

/// Every value of the short types, ties and infinities among them; and scales of many values, each a division.
#[test]
fn agrees_with_the_cpu_on_every_short_value() -> Result<()> {
    everywhere(|device| {
        let mut random = Random(11);
        let rows: Vec<f32> = (0..1 << 16)
            .map(|_| f32::from_bits(random.bits() & 0x7fff_ffff))
            .collect();
        let x = floats(&rows, &[1 << 16, 1], DType::F32)?;
        let (found, expected) = (
            candle_fp8_xpu::quantize_per_token(device, &x)?,
            candle_fp8::quantize_per_token(&x)?,
        );
        assert!(bits(&found.1)? == bits(&expected.1)?, "scales differ");
        let values = |from: fn(u16) -> f32| (0..=u16::MAX).map(from).collect::<Vec<f32>>();
        for (values, dtype) in [
            (
                values(|bits| half::bf16::from_bits(bits).to_f32()),
                DType::BF16,
            ),
            (
                values(|bits| half::f16::from_bits(bits).to_f32()),
                DType::F16,
            ),
        ] {
            let x = floats(&values, &[256, 256], dtype)?;
            for scale in [1.0, 0.25, 3.0, 448.0] {
                let found = bits(&candle_fp8_xpu::quantize_static(device, &x, scale)?)?;
                let expected = bits(&candle_fp8::quantize_static(&x, scale)?)?;
                for (i, value) in values.iter().enumerate() {
                    assert_eq!(found[i], expected[i], "{value:e} by {scale}");
                }
            }
        }
        Ok(())
    })
}
