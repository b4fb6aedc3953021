//! Several linears of one input at once: bit for bit what each gives alone.

use candle_compressed_tensors::{
    CtDenseLinear, CtFp8Linear, CtLinear, forward_shared, merge_linears,
};
use candle_core::{DType, Device, Result, Tensor};
use candle_fp8::{Quantization, Rounding, ScaleLayout, quantize_weight, weight_scale};
use candle_nn::Module;

#[path = "ops/devices.rs"]
mod devices;

const K: usize = 200;

fn random(shape: &[usize]) -> Result<Tensor> {
    Tensor::randn(0f32, 1., shape, &Device::Cpu)
}

fn fp8(n: usize, layout: ScaleLayout, activations: Option<Quantization>) -> Result<CtLinear> {
    let weight = random(&[n, K])?;
    let scale = weight_scale(&weight, layout, DType::F32)?;
    let codes = quantize_weight(&weight, &scale, layout, Rounding::Once)?;
    let bias = match n % 2 {
        0 => Some(random(&[n])?),
        _ => None,
    };
    CtFp8Linear::new(codes, scale, layout, bias, activations).map(CtLinear::Fp8)
}

fn dense(n: usize, dtype: DType) -> Result<CtLinear> {
    let weight = random(&[n, K])?.to_dtype(dtype)?;
    CtDenseLinear::new(weight, None).map(CtLinear::Dense)
}

fn bits(tensor: &Tensor) -> Result<Vec<u32>> {
    let values = tensor.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?;
    Ok(values.into_iter().map(f32::to_bits).collect())
}

fn check(what: &str, linears: &[CtLinear], dtypes: &[DType]) -> Result<()> {
    let linears: Vec<&CtLinear> = linears.iter().collect();
    for shape in [&[1, K][..], &[1, 3, K], &[2, 17, K]] {
        for dtype in dtypes {
            // Rows of other magnitudes, so that their scales differ.
            let x = random(shape)?.broadcast_mul(&random(&[shape[shape.len() - 2], 1])?)?;
            let x = x.to_dtype(*dtype)?;
            let together = forward_shared(&linears, &x)?;
            assert_eq!(together.len(), linears.len());
            for (i, (linear, found)) in linears.iter().zip(&together).enumerate() {
                let alone = linear.forward(&x)?;
                assert_eq!((found.dtype(), found.shape()), (*dtype, alone.shape()));
                assert!(
                    bits(found)? == bits(&alone)?,
                    "{what}, linear {i}, {shape:?} {dtype:?}: together and alone differ"
                );
            }
        }
    }
    Ok(())
}

const FLOATS: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

#[test]
fn equal_linears_give_what_each_gives_alone() -> Result<()> {
    let block = ScaleLayout::Block { rows: 16, cols: 48 };
    for activations in [
        None,
        Some(Quantization::PerToken),
        Some(Quantization::PerTensor),
        Some(Quantization::PerGroup(64)),
        Some(Quantization::Static(0.01)),
    ] {
        for layout in [ScaleLayout::Tensor, ScaleLayout::Channel, block] {
            let linears = [64, 33, 1].map(|n| fp8(n, layout, activations));
            let linears = linears.into_iter().collect::<Result<Vec<_>>>()?;
            check(&format!("{layout:?} {activations:?}"), &linears, &FLOATS)?;
        }
    }
    Ok(())
}

#[test]
fn unequal_linears_give_what_each_gives_alone() -> Result<()> {
    let (channel, token) = (ScaleLayout::Channel, Some(Quantization::PerToken));
    let scaled = |scale| fp8(40, channel, Some(Quantization::Static(scale)));
    let block = |rows, cols| fp8(40, ScaleLayout::Block { rows, cols }, token);
    for (what, linears) in [
        (
            "tensor beside channel",
            [
                fp8(40, ScaleLayout::Tensor, token)?,
                fp8(24, channel, token)?,
            ],
        ),
        (
            "one ulp between static scales",
            [scaled(0.01)?, scaled(0.01f32.next_up())?],
        ),
        ("another static scale", [scaled(0.01)?, scaled(0.02)?]),
        (
            "per token beside static",
            [fp8(40, channel, token)?, scaled(0.01)?],
        ),
        (
            "quantized beside not",
            [fp8(40, channel, token)?, fp8(40, channel, None)?],
        ),
        ("blocks of other rows", [block(8, 64)?, block(16, 64)?]),
        ("blocks of other columns", [block(8, 64)?, block(8, 48)?]),
        (
            "block beside channel",
            [block(8, 64)?, fp8(40, channel, token)?],
        ),
        (
            "FP8 beside dense",
            [fp8(40, channel, token)?, dense(24, DType::BF16)?],
        ),
        ("dense", [dense(40, DType::BF16)?, dense(24, DType::BF16)?]),
    ] {
        check(what, &linears, &FLOATS)?;
    }
    check(
        "dense in F32",
        &[dense(40, DType::F32)?, dense(24, DType::BF16)?],
        &[DType::F32],
    )
}

#[test]
fn one_linear_and_none_are_fine() -> Result<()> {
    let token = Some(Quantization::PerToken);
    check("one", &[fp8(40, ScaleLayout::Channel, token)?], &FLOATS)?;
    assert!(forward_shared(&[], &random(&[1, K])?)?.is_empty());
    Ok(())
}

#[test]
fn an_input_that_does_not_fit_is_an_error() -> Result<()> {
    let linear = || fp8(40, ScaleLayout::Channel, Some(Quantization::PerToken));
    let (a, b) = (linear()?, linear()?);
    assert!(forward_shared(&[&a, &b], &random(&[2, K + 1])?).is_err());
    Ok(())
}

/// A linear's copy on a device; its scale may be another.
fn moved(linear: &CtLinear, device: &Device) -> Result<CtLinear> {
    let CtLinear::Fp8(linear) = linear else {
        candle_core::bail!("only FP8 linears are moved");
    };
    let bias = linear.bias().map(|bias| bias.to_device(device));
    let linear = CtFp8Linear::new(
        linear.weight()?.to_device(device)?,
        linear.weight_scale().to_device(device)?,
        linear.layout(),
        bias.transpose()?,
        linear.activations(),
    );
    linear.map(CtLinear::Fp8)
}

/// Merges copies of linears on every device: they are what they were, and together give what each gives alone, but for
/// the order in which products are added, of whose sums tensor cores keep 13 bits. Where `merges`, on a GPU, the
/// results are parts of one.
fn check_merged<const N: usize>(what: &str, linears: [CtLinear; N], merges: bool) -> Result<()> {
    devices::everywhere(|device| {
        let copies = linears.iter().map(|linear| moved(linear, device));
        let copies: Vec<CtLinear> = copies.collect::<Result<_>>()?;
        let merged: [CtLinear; N] = merge_linears(copies.try_into().expect("as many"))?;
        for (i, (merged, linear)) in merged.iter().zip(&linears).enumerate() {
            let codes = |linear: &CtLinear| -> Result<Vec<u8>> {
                let codes = linear.weight()?.to_device(&Device::Cpu)?.flatten_all()?;
                let codes = codes.to_vec1::<float8::F8E4M3>()?;
                Ok(codes.into_iter().map(|code| code.to_bits()).collect())
            };
            assert_eq!(codes(merged)?, codes(linear)?, "{what}, weight {i}");
            let (CtLinear::Fp8(merged), CtLinear::Fp8(linear)) = (merged, linear) else {
                candle_core::bail!("they are FP8");
            };
            assert_eq!(merged.layout(), linear.layout(), "{what}, layout {i}");
            let scale = merged.weight_scale().to_device(&Device::Cpu)?;
            assert_eq!(
                bits(&scale)?,
                bits(linear.weight_scale())?,
                "{what}, scale {i}"
            );
        }
        let all: Vec<&CtLinear> = merged.iter().collect();
        for shape in [&[1, K][..], &[2, 17, K], &[130, K]] {
            let x = random(shape)?.to_device(device)?;
            let together = forward_shared(&all, &x)?;
            assert_eq!(together.len(), N);
            let parts = merges && device.is_cuda() && shape.len() > 2;
            for (i, (linear, found)) in all.iter().zip(&together).enumerate() {
                let alone = linear.forward(&x)?;
                assert_eq!((found.dtype(), found.dims()), (alone.dtype(), alone.dims()));
                if parts {
                    assert!(!found.is_contiguous(), "{what}, linear {i}: not merged");
                }
                let largest = alone.abs()?.max_all()?.to_scalar::<f32>()?;
                let worst = (found - &alone)?.abs()?.max_all()?.to_scalar::<f32>()?;
                assert!(
                    worst <= 2e-3 * largest,
                    "{what}, linear {i}, {shape:?}: {worst} of {largest}"
                );
            }
        }
        Ok(())
    })
}

#[test]
fn merged_linears_are_what_they_were() -> Result<()> {
    let token = Some(Quantization::PerToken);
    let block = ScaleLayout::Block { rows: 16, cols: 48 };
    for layout in [ScaleLayout::Tensor, ScaleLayout::Channel, block] {
        for activations in [None, token, Some(Quantization::Static(0.01))] {
            let linear = |n| fp8(n, layout, activations);
            let what = format!("{layout:?} {activations:?}");
            check_merged(&what, [linear(64)?, linear(32)?, linear(96)?], true)?;
            // The last may be of any size; those with an odd one have no bias.
            check_merged(&what, [linear(48)?, linear(22)?], true)?;
            check_merged(&what, [linear(64)?, linear(33)?], false)?;
            check_merged(&what, [linear(44)?, linear(64)?], false)?;
        }
    }
    let channel = ScaleLayout::Channel;
    let differ = [
        [fp8(64, channel, token)?, fp8(64, channel, None)?],
        [fp8(64, channel, token)?, fp8(64, block, token)?],
        [fp8(64, block, token)?, fp8(64, ScaleLayout::Tensor, token)?],
    ];
    for linears in differ {
        check_merged("of different kinds", linears, false)?;
    }
    check_merged(
        "rows within a block",
        [fp8(40, block, token)?, fp8(64, block, token)?],
        false,
    )
}
