//! Products over the case table, and over sizes that lead to every kernel.

use candle_core::{DType, Result, Tensor};
use candle_fp8_xpu::{Input, Quantization, XpuDevice, XpuWeight, scaled_mm, scaled_mm_many};

use crate::devices::{bits, codes, dtype, everywhere, floats};
use crate::oracle::cases::{Case, Data, table};
use crate::oracle::{Float, Layout, Mode};

pub(crate) fn input(x: &Tensor, mode: Mode) -> Input<'_> {
    match mode {
        Mode::Full => Input::Full(x),
        Mode::Token => Input::Quantize(x, Quantization::PerToken),
        Mode::Tensor => Input::Quantize(x, Quantization::PerTensor),
        Mode::Static(scale) => Input::Quantize(x, Quantization::Static(scale)),
        Mode::Group(group) => Input::Quantize(x, Quantization::PerGroup(group)),
    }
}

fn weight(case: &Case, data: &Data, device: &XpuDevice) -> Result<XpuWeight> {
    let shape = match case.layout {
        Layout::Tensor => vec![1],
        _ => {
            let (rows, cols) = case.layout.grid(case.n, case.k);
            vec![rows, cols]
        }
    };
    let block = match case.layout {
        Layout::Block(rows, cols) => Some((rows, cols)),
        _ => None,
    };
    let scale = floats(&data.scales, &shape, DType::F32)?;
    let bias = floats(&data.bias, &[case.n], dtype(case.float))?;
    let codes = codes(&data.weight, (case.n, case.k))?;
    XpuWeight::new(device, &codes, &scale, block, case.bias.then_some(&bias))
}

fn agrees(case: &Case, device: &XpuDevice) -> Result<()> {
    let data = case.data();
    let shape = [&case.lead[..], &[case.k]].concat();
    let x = floats(&data.x, &shape, dtype(case.float))?;
    let y = scaled_mm(input(&x, case.mode), &weight(case, &data, device)?)?;
    assert_eq!(y.dims(), [&case.lead[..], &[case.n]].concat());
    assert_eq!(y.dtype(), dtype(case.float));
    let found: Vec<f64> = (y.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?)
        .into_iter()
        .map(f64::from)
        .collect();
    if let Err(text) = case.expected(&data).check(&found, case.k, case.float) {
        panic!("{case:?}: {text}");
    }
    Ok(())
}

#[test]
fn agrees_with_the_oracle() -> Result<()> {
    everywhere(|device| table().iter().try_for_each(|case| agrees(case, device)))
}

/// Few, some and many rows; scales that change along K where every kernel can follow, and where only one can.
#[test]
fn every_kernel_agrees_with_the_oracle() -> Result<()> {
    everywhere(|device| {
        let mut seed = 100;
        for m in [1, 2, 3, 8, 9, 33, 70] {
            for (layout, mode) in [
                (Layout::Channel, Mode::Token),
                (Layout::Tensor, Mode::Full),
                (Layout::Block(48, 32), Mode::Group(48)),
                (Layout::Block(128, 128), Mode::Full),
                (Layout::Block(16, 24), Mode::Token),
            ] {
                seed += 1;
                // Compiling a kernel takes longer than running it: each way meets each type, not each of both.
                let float = [Float::Bf16, Float::F16, Float::F32][seed as usize % 3];
                let k = [150, 256][seed as usize % 2];
                let case = Case {
                    lead: vec![m],
                    n: 77,
                    k,
                    layout,
                    mode,
                    float,
                    bias: m % 2 == 1,
                    seed,
                };
                agrees(&case, device)?;
            }
        }
        Ok(())
    })
}

#[test]
fn nan_goes_where_it_should() -> Result<()> {
    everywhere(|device| {
        for (m, mode, float) in [
            (2, Mode::Token, Float::Bf16),
            (20, Mode::Full, Float::F16),
            (20, Mode::Token, Float::F32),
        ] {
            let case = Case {
                lead: vec![m],
                n: 40,
                k: 64,
                layout: Layout::Channel,
                mode,
                float,
                bias: false,
                seed: 5,
            };
            let mut data = case.data();
            data.weight[64 * 7 + 3] = 0xff;
            let x = floats(&data.x, &[m, 64], dtype(float))?;
            let y = scaled_mm(input(&x, mode), &weight(&case, &data, device)?)?;
            let y = y.to_dtype(DType::F32)?.to_vec2::<f32>()?;
            for row in y {
                let nans: Vec<usize> = (0..40).filter(|&i| row[i].is_nan()).collect();
                assert_eq!(nans, [7], "{case:?}");
            }
        }
        Ok(())
    })
}

#[test]
fn several_weights_give_what_each_gives() -> Result<()> {
    everywhere(|device| {
        let case = |n| Case {
            lead: vec![2, 3],
            n,
            k: 96,
            layout: Layout::Channel,
            mode: Mode::Token,
            float: Float::Bf16,
            bias: true,
            seed: n as u64,
        };
        let weights = [40, 8, 24]
            .map(|n| weight(&case(n), &case(n).data(), device))
            .into_iter()
            .collect::<Result<Vec<_>>>()?;
        let x = floats(&case(1).data().x, &[2, 3, 96], DType::BF16)?;
        let input = Input::Quantize(&x, Quantization::PerToken);
        let before = device.transfers();
        let all = scaled_mm_many(input, &weights.iter().collect::<Vec<_>>())?;
        let uploads = device.transfers().uploads - before.uploads;
        assert!(uploads <= 1, "the input is sent once, not {uploads} times");
        for (found, weight) in all.iter().zip(&weights) {
            let alone = scaled_mm(input, weight)?
                .to_dtype(DType::F32)?
                .flatten_all()?
                .to_vec1::<f32>()?;
            assert_eq!(
                found
                    .to_dtype(DType::F32)?
                    .flatten_all()?
                    .to_vec1::<f32>()?,
                alone
            );
        }
        Ok(())
    })
}

/// Every code is decoded exactly, as a weight and as an activation, by every kernel and in every type: each is a value of
/// all of them, and one product with 1 is no rounding.
#[test]
fn every_code_is_exact() -> Result<()> {
    everywhere(|device| {
        let all: Vec<u8> = (0..=255).collect();
        // A sum with a zero is +0.
        let values: Vec<f32> = all
            .iter()
            .map(|&code| float8::F8E4M3::from_bits(code).to_f32() + 0.0)
            .collect();
        let scale = Tensor::ones(1, DType::F32, &candle_core::Device::Cpu)?;
        let column = XpuWeight::new(device, &codes(&all, (256, 1))?, &scale, None, None)?;
        let one = XpuWeight::new(device, &codes(&[0x38], (1, 1))?, &scale, None, None)?;
        let expected = bits(&Tensor::new(&values[..], &candle_core::Device::Cpu)?)?;
        for dtype in [DType::BF16, DType::F16, DType::F32] {
            for m in [1, 3, 40] {
                let ones = floats(&vec![1.0; m], &[m, 1], dtype)?;
                for input in [
                    Input::Full(&ones),
                    Input::Quantize(&ones, Quantization::Static(1.0)),
                ] {
                    let y = scaled_mm(input, &column)?;
                    for row in 0..m {
                        assert_eq!(bits(&y.get(row)?)?, expected, "{dtype:?}, row {row} of {m}");
                    }
                }
            }
            let x = floats(&values, &[256, 1], dtype)?;
            for rows in [1, 3, 256] {
                for first in (0..=256 - rows).step_by(rows) {
                    let part = x.narrow(0, first, rows)?;
                    let input = Input::Quantize(&part, Quantization::Static(1.0));
                    let found = bits(&scaled_mm(input, &one)?.flatten_all()?)?;
                    assert_eq!(
                        found,
                        expected[first..first + rows],
                        "{dtype:?} from {first}"
                    );
                }
            }
        }
        Ok(())
    })
}

/// A block may be larger than the weight.
#[test]
fn one_block_of_all_is_one_scale() -> Result<()> {
    everywhere(|device| {
        let data: Vec<u8> = (0..40 * 70).map(|i| (i * 37 % 120) as u8).collect();
        let all = codes(&data, (40, 70))?;
        let scale = floats(&[0.25], &[1, 1], DType::F32)?;
        let block = Some((usize::MAX, usize::MAX));
        let blocked = XpuWeight::new(device, &all, &scale, block, None)?;
        let plain = XpuWeight::new(device, &all, &scale.flatten_all()?, None, None)?;
        for m in [1, 20] {
            let x = floats(&vec![0.5; m * 70], &[m, 70], DType::F32)?;
            let [found, expected] = [blocked.codes()?, plain.codes()?];
            assert_eq!(bits(&found)?, bits(&expected)?);
            let [found, expected] = [&blocked, &plain].map(|w| scaled_mm(Input::Full(&x), w));
            assert_eq!(bits(&found?)?, bits(&expected?)?, "{m} rows");
        }
        Ok(())
    })
}

/// Threads that share a device and a weight get what each of them gets alone.
#[test]
fn threads_share_a_device() -> Result<()> {
    everywhere(|device| {
        let case = Case {
            lead: vec![5],
            n: 50,
            k: 96,
            layout: Layout::Channel,
            mode: Mode::Token,
            float: Float::Bf16,
            bias: true,
            seed: 21,
        };
        let data = case.data();
        let weight = weight(&case, &data, device)?;
        let inputs = (1..6)
            .map(|rows| {
                let dtype = [DType::BF16, DType::F32][rows % 2];
                let x = floats(&data.x, &[5, 96], dtype)?.narrow(0, 0, rows)?;
                let y = scaled_mm(Input::Quantize(&x, Quantization::PerToken), &weight)?;
                Ok((x, bits(&y)?))
            })
            .collect::<Result<Vec<_>>>()?;
        let used = device.used_bytes();
        std::thread::scope(|scope| {
            for (x, expected) in &inputs {
                let weight = &weight;
                scope.spawn(move || {
                    for _ in 0..20 {
                        let input = Input::Quantize(x, Quantization::PerToken);
                        let y = scaled_mm(input, weight).expect("as before");
                        assert_eq!(&bits(&y).expect("floats"), expected);
                    }
                });
            }
        });
        assert_eq!(device.used_bytes(), used);
        Ok(())
    })
}

/// Rows that have to be padded on the device, and such that need not.
#[test]
fn scaled_mm_weights_come_back() -> Result<()> {
    everywhere(|device| {
        for k in [70, 96] {
            let all: Vec<u8> = (0..7 * k).map(|i| (i * 37 % 256) as u8).collect();
            let all = codes(&all, (7, k))?;
            let scale = Tensor::ones((7, 1), DType::F32, &candle_core::Device::Cpu)?;
            let weight = XpuWeight::new(device, &all, &scale, None, None)?;
            assert_eq!(weight.codes()?.dims(), [7, k]);
            assert_eq!(bits(&weight.codes()?)?, bits(&all)?, "{k}");
        }
        Ok(())
    })
}
