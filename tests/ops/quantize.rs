//! The activation quantizers, exactly, and `fake_quantize`.

use crate::cases::{code_bits, dtype, table, values};
use crate::devices::everywhere;
use crate::oracle::{self, Float, Mode};
use candle_core::{DType, Result, Tensor};

#[test]
fn codes_and_scales_are_exact() -> Result<()> {
    everywhere(|device| {
        for case in table() {
            let data = case.data();
            let x = case.x(&data, device)?;
            let wide: Vec<f64> = data.x.iter().map(|&v| f64::from(v)).collect();
            for mode in [
                Mode::Token,
                Mode::Tensor,
                Mode::Static(0.011),
                Mode::Group(7),
                Mode::Group(1 << 20),
            ] {
                let expected = oracle::quantize(&wide, case.k, mode);
                let (codes, scales, run) = match mode {
                    Mode::Token => {
                        let (codes, scales) = candle_fp8::quantize_per_token(&x)?;
                        (codes, scales, case.k)
                    }
                    Mode::Tensor => {
                        let (codes, scales) = candle_fp8::quantize_per_tensor(&x)?;
                        (codes, scales, wide.len())
                    }
                    Mode::Group(group) => {
                        let (codes, scales) = candle_fp8::quantize_per_group(&x, group)?;
                        (codes, scales, group)
                    }
                    Mode::Static(scale) => (
                        candle_fp8::quantize_static(&x, scale)?,
                        Tensor::new(&[scale], device)?,
                        wide.len(),
                    ),
                    Mode::Full => unreachable!("not in the list"),
                };
                assert_eq!(codes.dims(), x.dims());
                assert_eq!(codes.dtype(), DType::F8E4M3);
                assert_eq!(code_bits(&codes)?, expected.codes, "{mode:?} {case:?}");

                assert_eq!(scales.dtype(), DType::F32);
                if matches!(mode, Mode::Tensor | Mode::Static(_)) {
                    assert_eq!(scales.dims(), [1]);
                } else {
                    let mut shape = case.lead.clone();
                    shape.push(case.k.div_ceil(run));
                    assert_eq!(scales.dims(), shape);
                }
                // The first scale of each run, row by row.
                let row = if run == wide.len() {
                    run.max(1)
                } else {
                    case.k
                };
                let firsts: Vec<f64> = expected
                    .scales
                    .chunks(row)
                    .flat_map(|row| row.chunks(run).map(|run| run[0]))
                    .collect();
                if !firsts.is_empty() {
                    assert_eq!(values(&scales)?, firsts, "{mode:?} {case:?}");
                }
            }
        }
        Ok(())
    })
}

#[test]
fn special_values() -> Result<()> {
    everywhere(|device| {
        let x = Tensor::new(
            &[
                [0f32, -0.0, 0.0],
                [f32::NAN, 1.0, -1.0],
                [f32::INFINITY, 1.0, -1.0],
                [f32::from_bits(1), 0.0, -f32::from_bits(3)],
            ],
            device,
        )?;
        let (codes, scales) = candle_fp8::quantize_per_token(&x)?;
        let codes = code_bits(&codes)?;
        let scales = scales.flatten_all()?.to_vec1::<f32>()?;
        assert_eq!((&codes[..3], scales[0]), (&[0, 0x80, 0][..], 1.0 / 448.0));
        assert!(codes[3..6].iter().all(|c| c & 0x7f == 0x7f) && scales[1].is_nan());
        // Infinity over infinity is NaN; the finite ones vanish.
        assert_eq!((codes[6] & 0x7f, codes[7], codes[8]), (0x7f, 0x00, 0x80));
        assert_eq!(scales[2], f32::INFINITY);
        assert_eq!(
            (&codes[9..], scales[3]),
            (&[0, 0, 0x80][..], f32::MIN_POSITIVE)
        );
        Ok(())
    })
}

#[test]
fn fake_quantize_agrees_with_the_oracle() -> Result<()> {
    everywhere(|device| {
        let (b, h, l, d) = (2, 3, 5, 7);
        let per_head = [0.01f32, 0.5, 0.0007];
        for float in [Float::Bf16, Float::F16, Float::F32] {
            let x = Tensor::randn(0f32, 1., (b, h, l, d), device)?.to_dtype(dtype(float))?;
            let transposed = x.transpose(1, 2)?.contiguous()?.transpose(1, 2)?;
            for (scale, shape) in [
                (&per_head[..], vec![h, 1, 1]),
                (&per_head[..1], vec![1]),
                (&per_head[..1], vec![1, 1, 1]),
            ] {
                let scales = Tensor::from_slice(scale, shape, device)?;
                let expected: Vec<f64> = values(&x)?
                    .into_iter()
                    .enumerate()
                    .map(|(i, x)| {
                        let scale = f64::from(scale[i / (l * d) % h % scale.len()]);
                        let code = oracle::encode(Float::F32.round(x / scale));
                        float.round(Float::F32.round(oracle::decode(code) * scale))
                    })
                    .collect();
                for x in [&x, &transposed] {
                    let y = candle_fp8::fake_quantize(x, &scales)?;
                    assert_eq!((y.dims(), y.dtype()), (x.dims(), x.dtype()));
                    assert_eq!(values(&y)?, expected);
                }
            }
        }
        Ok(())
    })
}
