//! `scaled_mm` of sizes that models have, of weights that start anywhere, of several weights at once.

use crate::cases::{Case, codes, input, layout, values};
use crate::devices::everywhere;
#[cfg(feature = "cuda")]
use crate::devices::gpu;
use crate::oracle::{Float, Layout, Mode};
use candle_core::{Device, Result, Tensor};
use candle_fp8::{Codes, Input, ScaleLayout, Weight, scaled_mm, scaled_mm_many};

fn case(m: usize, (n, k): (usize, usize), layout: Layout, mode: Mode, float: Float) -> Case {
    Case {
        lead: vec![m],
        n,
        k,
        layout,
        mode,
        float,
        bias: m.is_multiple_of(2),
        seed: (m * 31 + n) as u64,
    }
}

/// Rows as in decoding, in batches and in prompts: each takes other kernels on a GPU.
#[test]
fn rows_of_all_numbers() -> Result<()> {
    use Float::{Bf16, F16, F32};
    use Layout::{Block, Channel, Tensor};
    use Mode::{Full, Group, Static, Token};
    let kinds = [
        (Channel, Token, Bf16),
        (Tensor, Static(0.0031), F16),
        (Block(128, 128), Group(128), Bf16),
        (Tensor, Mode::Tensor, F32),
        (Channel, Full, Bf16),
        (Block(128, 128), Full, F16),
    ];
    for m in [1, 7, 16, 33, 130, 260] {
        for (layout, mode, float) in kinds {
            let case = case(m, (272, 512), layout, mode, float);
            let data = case.data();
            let expected = case.expected(&data);
            everywhere(|device| {
                let y = case.run(&data, device)?;
                if let Err(text) = case.check(&y, &expected) {
                    panic!("{case:?}: {text}");
                }
                Ok(())
            })?;
        }
    }
    Ok(())
}

/// The parts of a call, on a device.
struct Parts {
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
}

impl Parts {
    fn new(case: &Case, device: &Device) -> Result<Self> {
        let data = case.data();
        let shape = layout(case.layout).shape(case.n, case.k);
        Ok(Self {
            x: case.x(&data, device)?,
            weight: codes(&data.weight, (case.n, case.k), device)?,
            scale: Tensor::from_slice(&data.scales, shape, device)?,
        })
    }

    fn run<'a>(&self, case: &Case, weight: impl Into<Codes<'a>>) -> Result<Vec<f64>> {
        let (input, layout) = (input(&self.x, case.mode), layout(case.layout));
        values(&scaled_mm(input, weight, &self.scale, layout, None)?)
    }
}

#[test]
fn weights_start_and_end_anywhere() -> Result<()> {
    everywhere(|device| {
        for k in [64, 70, 260] {
            for mode in [Mode::Token, Mode::Group(128), Mode::Full] {
                let case = case(3, (37, k), Layout::Channel, mode, Float::Bf16);
                let parts = Parts::new(&case, device)?;
                let expected = parts.run(&case, &parts.weight)?;

                let packed = candle_fp8::pack_weight(&parts.weight)?;
                assert_eq!(parts.run(&case, &packed)?, expected, "packed, {case:?}");

                // Behind some other bytes.
                for before in [1, 8, 16] {
                    let mut bytes = vec![0x7f; before];
                    bytes.extend(case.data().weight);
                    let count = 37 * k;
                    let shifted = codes(&bytes, before + count, device)?
                        .narrow(0, before, count)?
                        .reshape((37, k))?;
                    assert!(shifted.is_contiguous());
                    assert_eq!(
                        parts.run(&case, &shifted)?,
                        expected,
                        "shifted by {before}, {case:?}"
                    );
                }
            }
        }
        Ok(())
    })
}

#[test]
fn quantized_activations_of_any_layout() -> Result<()> {
    everywhere(|device| {
        for k in [64, 70] {
            let case = case(6, (37, k), Layout::Channel, Mode::Token, Float::F32);
            let parts = Parts::new(&case, device)?;
            let expected = parts.run(&case, &parts.weight)?;
            let (x, scales) = candle_fp8::quantize_per_token(&parts.x)?;
            let run = |x: &Tensor, scales: &Tensor| -> Result<Vec<f64>> {
                let input = Input::Codes {
                    codes: x,
                    scales,
                    group: None,
                    dtype: case.dtype(),
                };
                let y = scaled_mm(
                    input,
                    &parts.weight,
                    &parts.scale,
                    ScaleLayout::Channel,
                    None,
                )?;
                values(&y)
            };
            assert_eq!(run(&x, &scales)?, expected);
            // Columns of a wider matrix, between NaN; every second row of scales.
            let bytes: Vec<u8> = crate::cases::code_bits(&x)?
                .chunks(k)
                .flat_map(|row| [&[0x7f; 16], row, &[0x7f; 26]].concat())
                .collect();
            let wide = codes(&bytes, (6, k + 42), device)?.narrow(1, 16, k)?;
            let pairs = Tensor::cat(&[&scales, &scales.zeros_like()?], 1)?.narrow(1, 0, 1)?;
            assert!(!wide.is_contiguous() && !pairs.is_contiguous());
            assert_eq!(run(&wide, &pairs)?, expected);
            // Columns first: Candle cannot copy strided codes on a GPU.
            let transposed = x.to_device(&Device::Cpu)?.t()?.contiguous()?;
            let transposed = transposed.to_device(device)?.t()?;
            assert_eq!(run(&transposed, &scales)?, expected);
        }
        Ok(())
    })
}

#[test]
fn several_weights_at_once() -> Result<()> {
    everywhere(|device| {
        for m in [0, 1, 40] {
            for (mode, float) in [
                (Mode::Token, Float::Bf16),
                (Mode::Static(0.01), Float::F16),
                (Mode::Full, Float::Bf16),
            ] {
                let k = 256;
                let cases = [
                    (48, Layout::Channel),
                    (16, Layout::Channel),
                    (33, Layout::Block(16, 128)),
                ]
                .map(|(n, layout)| case(m, (n, k), layout, mode, float));
                let parts = [0, 1, 2].map(|i| Parts::new(&cases[i], device));
                let parts: Vec<Parts> = parts.into_iter().collect::<Result<_>>()?;
                let bias = Tensor::from_slice(&cases[1].data().bias, 16, device)?;
                let weights = [0, 1, 2].map(|i| Weight {
                    codes: (&parts[i].weight).into(),
                    scale: &parts[i].scale,
                    layout: layout(cases[i].layout),
                    bias: (i == 1).then_some(&bias),
                });
                let input = input(&parts[0].x, mode);
                let found = scaled_mm_many(input, &weights)?;
                assert_eq!(found.len(), 3);
                for (found, w) in found.iter().zip(weights) {
                    let expected = scaled_mm(input, w.codes, w.scale, w.layout, w.bias)?;
                    assert_eq!(found.dims(), expected.dims());
                    assert_eq!(values(found)?, values(&expected)?, "{m} {mode:?}");
                }
            }
        }
        Ok(())
    })
}

#[cfg(feature = "cuda")]
#[test]
fn tensors_of_two_devices_are_refused() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let case = case(3, (37, 64), Layout::Channel, Mode::Token, Float::Bf16);
    let (here, there) = (Parts::new(&case, &Device::Cpu)?, Parts::new(&case, &gpu)?);
    for (x, weight, scale) in [
        (&here.x, &there.weight, &there.scale),
        (&there.x, &here.weight, &here.scale),
        (&there.x, &there.weight, &here.scale),
    ] {
        let y = scaled_mm(
            input(x, case.mode),
            weight,
            scale,
            ScaleLayout::Channel,
            None,
        );
        let text = y.unwrap_err().to_string();
        assert!(
            text.contains("scaled_mm") && text.contains("as the other tensors"),
            "{text}"
        );
    }
    Ok(())
}
