//! `scaled_mm` over the case table, and proof that the bound of the comparison is tight enough to catch mistakes.

use crate::cases::{Case, Data, code_bits, codes, layout, table, values};
use crate::devices::everywhere;
use crate::oracle::{Float, Layout, Mode};
use candle_core::{DType, Device, Result, Tensor};
use candle_fp8::{Input, Quantization, ScaleLayout, pack_weight, scaled_mm};

#[test]
fn agrees_with_the_oracle() -> Result<()> {
    everywhere(|device| {
        for case in table() {
            let data = case.data();
            let y = case.run(&data, device)?;
            let expected = case.expected(&data);
            if let Err(text) = case.check(&y, &expected) {
                panic!("{case:?}: {text}");
            }
        }
        Ok(())
    })
}

#[test]
fn packed_weights_agree_with_the_oracle() -> Result<()> {
    everywhere(|device| {
        for case in table() {
            let data = case.data();
            let weight = codes(&data.weight, (case.n, case.k), device)?;
            let packed = pack_weight(&weight)?;
            let y = case.run_with(&case.x(&data, device)?, &packed, &data, device)?;
            if let Err(text) = case.check(&y, &case.expected(&data)) {
                panic!("{case:?}: {text}");
            }
            assert_eq!(packed.dims(), (case.n, case.k));
            assert_eq!(code_bits(&packed.unpack()?)?, data.weight, "{case:?}");
        }
        Ok(())
    })
}

#[test]
fn takes_activations_in_any_layout() -> Result<()> {
    everywhere(|device| {
        for case in table() {
            let data = case.data();
            let plain = case.x(&data, device)?;
            let expected = case.run(&data, device)?;
            if case.m() == 0 {
                continue;
            }
            let rank = plain.rank();
            // Every second of twice as many columns, from the second half of a larger storage.
            let wide = Tensor::stack(&[&plain.ones_like()?, &plain], rank)?;
            let strided = wide.narrow(rank, 1, 1)?.squeeze(rank)?;
            assert!(!strided.is_contiguous() || case.m() * case.k == 1);
            let mut variants = vec![strided];
            if rank >= 2 {
                let transposed = plain.transpose(0, rank - 1)?.contiguous()?;
                variants.push(transposed.transpose(0, rank - 1)?);
                let shifted = Tensor::cat(&[&plain.ones_like()?, &plain], 0)?;
                variants.push(shifted.narrow(0, case.lead[0], case.lead[0])?);
            }
            for x in variants {
                let y = case.run_on(&x, &data, device)?;
                assert_eq!(
                    values(&y)?,
                    values(&expected)?,
                    "{case:?}, strides {:?}",
                    x.stride()
                );
            }
        }
        Ok(())
    })
}

#[test]
fn quantizing_before_or_inside_is_the_same() -> Result<()> {
    everywhere(|device| {
        for case in table() {
            let data = case.data();
            let x = case.x(&data, device)?;
            let (x_codes, scales, group) = match case.mode {
                Mode::Full => continue,
                Mode::Static(scale) => (
                    candle_fp8::quantize_static(&x, scale)?,
                    Tensor::new(&[scale], device)?,
                    None,
                ),
                Mode::Token => {
                    let (codes, scales) = candle_fp8::quantize_per_token(&x)?;
                    (codes, scales, None)
                }
                Mode::Tensor => {
                    let (codes, scales) = candle_fp8::quantize_per_tensor(&x)?;
                    (codes, scales, None)
                }
                Mode::Group(group) => {
                    let (codes, scales) = candle_fp8::quantize_per_group(&x, group)?;
                    (codes, scales, Some(group))
                }
            };
            let input = Input::Codes {
                codes: &x_codes,
                scales: &scales,
                group,
                dtype: case.dtype(),
            };
            let weight = codes(&data.weight, (case.n, case.k), device)?;
            let layout = layout(case.layout);
            let scale = Tensor::from_slice(&data.scales, layout.shape(case.n, case.k), device)?;
            let bias = Tensor::from_slice(&data.bias, case.n, device)?;
            let y = scaled_mm(input, &weight, &scale, layout, case.bias.then_some(&bias))?;
            if let Err(text) = case.check(&y, &case.expected(&data)) {
                panic!("{case:?}: {text}");
            }
        }
        Ok(())
    })
}

/// Rows of the case table that a mutant can show in: several rows, scales that differ.
fn mutable_cases() -> impl Iterator<Item = Case> {
    table()
        .into_iter()
        .filter(|case| case.m() > 1 && case.n > 1)
}

/// Runs the op on mutated data and asserts that the comparison rejects the result.
#[track_caller]
fn rejects(what: &str, case: &Case, mutant: &Case, data: &Data, mutated: &Data) -> Result<()> {
    let y = mutant.run(mutated, &Device::Cpu)?;
    let expected = case.expected(data);
    assert!(
        case.check(&y, &expected).is_err(),
        "{what} went unnoticed in {case:?}"
    );
    Ok(())
}

#[test]
fn bound_rejects_scales_in_the_wrong_place() -> Result<()> {
    let mut seen = [0; 3];
    for case in mutable_cases() {
        let data = case.data();
        let (rows, cols) = case.layout.grid(case.n, case.k);
        let mutated = |scales: Vec<f32>| Data {
            scales,
            ..data.clone()
        };
        if rows > 1 {
            let mut shifted = data.scales.clone();
            shifted.rotate_right(cols);
            rejects("a shift by one row", &case, &case, &data, &mutated(shifted))?;
            let mut reversed = data.scales.clone();
            reversed.reverse();
            rejects("the reverse order", &case, &case, &data, &mutated(reversed))?;
            seen[0] += 1;
        }
        if rows > 1 && cols > 1 {
            // Stored as [cols, rows] and read as [rows, cols].
            let transposed = (0..rows * cols)
                .map(|i| data.scales[i % rows * cols + i / rows])
                .collect();
            rejects("a transpose", &case, &case, &data, &mutated(transposed))?;
            let mut shifted = data.scales.clone();
            shifted.rotate_right(1);
            rejects(
                "a shift by one column",
                &case,
                &case,
                &data,
                &mutated(shifted),
            )?;
            seen[1] += 1;
        }
        let first = mutated(vec![data.scales[0]; data.scales.len()]);
        if rows * cols > 1 {
            rejects("one scale for all", &case, &case, &data, &first)?;
            seen[2] += 1;
        }
    }
    assert!(seen[0] > 10 && seen[1] > 6 && seen[2] > 10, "{seen:?}");
    Ok(())
}

#[test]
fn bound_rejects_the_wrong_activation_mode() -> Result<()> {
    for case in mutable_cases() {
        let data = case.data();
        for mode in [
            Mode::Full,
            Mode::Token,
            Mode::Tensor,
            Mode::Static(0.013),
            Mode::Group(16),
        ] {
            if std::mem::discriminant(&mode) == std::mem::discriminant(&case.mode) {
                continue;
            }
            // With one input, or a group that spans a row, these are the same thing.
            let whole_rows =
                matches!((case.mode, mode), (Mode::Group(g), Mode::Token) if g >= case.k);
            if case.k == 1 || whole_rows {
                continue;
            }
            let mutant = Case {
                mode,
                ..case.clone()
            };
            rejects(&format!("{mode:?}"), &case, &mutant, &data, &data)?;
        }
    }
    Ok(())
}

#[test]
fn bound_rejects_swapped_and_missing_parts() -> Result<()> {
    for case in mutable_cases() {
        let data = case.data();
        let mut rows_swapped = data.clone();
        rows_swapped.weight.rotate_right(case.k);
        rejects("weight rows shifted", &case, &case, &data, &rows_swapped)?;

        let mut column_dropped = data.clone();
        for row in column_dropped.weight.chunks_mut(case.k) {
            row[case.k - 1] = 0;
        }
        rejects("a lost last column", &case, &case, &data, &column_dropped)?;

        if case.bias {
            let mutant = Case {
                bias: false,
                ..case.clone()
            };
            rejects("a lost bias", &case, &mutant, &data, &data)?;
        }
    }
    Ok(())
}

#[test]
fn comparison_fails_on_an_unexpected_nan() -> Result<()> {
    for case in mutable_cases() {
        let data = case.data();
        let mut poisoned = data.clone();
        poisoned.weight[case.k * (case.n - 1)] = 0x7f;
        rejects("a NaN weight", &case, &case, &data, &poisoned)?;
        // And a NaN that is expected has to be there, and nowhere else.
        let y = case.run(&poisoned, &Device::Cpu)?;
        let expected = case.expected(&poisoned);
        assert!(expected.values.iter().any(|v| v.is_nan()));
        assert_eq!(case.check(&y, &expected), Ok(()), "{case:?}");
        let mut x_poisoned = data.clone();
        x_poisoned.x[case.k] = f32::NAN;
        let y = case.run(&x_poisoned, &Device::Cpu)?;
        assert_eq!(
            case.check(&y, &case.expected(&x_poisoned)),
            Ok(()),
            "{case:?}"
        );
    }
    Ok(())
}

#[test]
fn bias_may_have_another_dtype() -> Result<()> {
    everywhere(|device| {
        let weight = codes(&[0x38; 6], (2, 3), device)?; // Ones.
        let scale = Tensor::new(&[0.5f32], device)?;
        let x = Tensor::ones((4, 3), DType::F32, device)?;
        let bias = Tensor::new(&[1f32, -1.0], device)?;
        for dtype in [DType::BF16, DType::F16, DType::F32] {
            let bias = bias.to_dtype(dtype)?;
            let y = scaled_mm(
                Input::Full(&x),
                &weight,
                &scale,
                ScaleLayout::Tensor,
                Some(&bias),
            )?;
            assert_eq!(y.to_vec2::<f32>()?, vec![vec![2.5, 0.5]; 4]);
        }
        Ok(())
    })
}

#[test]
fn extreme_activations_do_not_panic() -> Result<()> {
    everywhere(|device| {
        let weight = codes(&[0x38; 8], (2, 4), device)?;
        let scale = Tensor::new(&[1f32], device)?;
        let run = |x: [f32; 4], quantization| -> Result<Vec<f32>> {
            let x = Tensor::from_slice(&x, (1, 4), device)?;
            let input = Input::Quantize(&x, quantization);
            scaled_mm(input, &weight, &scale, ScaleLayout::Tensor, None)?
                .flatten_all()?
                .to_vec1::<f32>()
        };
        let tiny = f32::from_bits(1);
        for quantization in [
            Quantization::PerToken,
            Quantization::PerTensor,
            Quantization::PerGroup(2),
        ] {
            assert_eq!(run([0.0; 4], quantization)?, [0.0; 2]);
            assert_eq!(run([-0.0; 4], quantization)?, [0.0; 2]);
            // Below the smallest scale, values vanish and do not blow up.
            assert_eq!(run([tiny; 4], quantization)?, [0.0; 2]);
            assert!(run([f32::INFINITY, 1.0, 1.0, 1.0], quantization)?[0].is_nan());
            assert!(run([f32::NAN, 1.0, 1.0, 1.0], quantization)?[0].is_nan());
            let large = run([f32::MAX, 0.0, 0.0, 0.0], quantization)?[0];
            assert!((large / f32::MAX - 1.0).abs() < 1e-6, "{large:e}");
        }
        // A static scale clamps instead: infinity becomes 448.
        let clamped = run([f32::INFINITY, 0.0, 0.0, 0.0], Quantization::Static(0.5))?;
        assert_eq!(clamped, [224.0; 2]);
        Ok(())
    })
}

#[test]
fn table_covers_what_it_should() {
    let table = table();
    let has = |f: &dyn Fn(&Case) -> bool| table.iter().any(f);
    for float in [Float::Bf16, Float::F16, Float::F32] {
        assert!(has(&|case| case.float == float));
    }
    for layout in [Layout::Tensor, Layout::Channel, Layout::Block(128, 128)] {
        assert!(has(&|case| case.layout == layout && case.mode == Mode::Full));
        assert!(has(&|case| case.layout == layout && case.mode != Mode::Full));
    }
    for case in &table {
        if let Layout::Block(..) = case.layout {
            let (rows, cols) = case.layout.grid(case.n, case.k);
            assert!(rows >= 3 && cols >= 2, "{case:?}");
        }
    }
}
