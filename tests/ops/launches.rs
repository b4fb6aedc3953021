//! Launches of a list against the ops: the same kernels, so the same results, but where a product or attention is cut
//! in another way.

use crate::cases::{Random, codes, floats, values};
use crate::devices::gpu;
use candle_core::{DType, Device, Result, Tensor};
use candle_fp8::{
    AttentionScratch, CacheHeads, Cached, Codes, HeadNorms, LaunchActivations, LaunchRope,
    Launches, Quantization, RopeAppend, ScaleLayout, Weight,
};

fn random(shape: &[usize], dtype: DType, seed: u64, device: &Device) -> Result<Tensor> {
    let mut random = Random(seed);
    let count = shape.iter().product();
    let values: Vec<f32> = (0..count).map(|_| random.signed() * 2.0).collect();
    floats(&values, shape, dtype, device)
}

fn assert_near(found: &Tensor, expected: &Tensor, what: &str) -> Result<()> {
    let (found, expected) = (values(found)?, values(expected)?);
    let largest = expected.iter().fold(0f64, |max, x| max.max(x.abs()));
    let pairs = found.iter().zip(&expected);
    let worst = pairs.fold(0f64, |worst, (a, b)| {
        let error = (a - b).abs();
        if error.is_nan() {
            f64::INFINITY
        } else {
            worst.max(error)
        }
    });
    assert_eq!(found.len(), expected.len(), "{what}");
    // Two roundings to BF16, and sums of which tensor cores keep 13 bits.
    assert!(worst <= 0.01 * largest, "{what}: {worst} of {largest}");
    Ok(())
}

/// What a launch leaves, as numbers.
fn made(activations: &LaunchActivations) -> Result<Vec<f64>> {
    match activations {
        LaunchActivations::Values(x) => values(x),
        LaunchActivations::Quantized(x, _) => {
            let codes = crate::cases::code_bits(&x.codes)?
                .into_iter()
                .map(f64::from);
            Ok(codes.chain(values(&x.scales)?).collect())
        }
    }
}

const QUANTIZATIONS: [Option<Quantization>; 4] = [
    None,
    Some(Quantization::PerToken),
    Some(Quantization::Static(0.013)),
    Some(Quantization::PerGroup(128)),
];

#[test]
fn a_list_is_its_ops() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    let (dtype, eps) = (DType::BF16, 1e-5);
    for (m, k, n) in [(1, 512, 384), (5, 256, 640)] {
        for quantization in QUANTIZATIONS {
            let what = format!("{m} {k} {n} {quantization:?}");
            let x = random(&[m, k], dtype, 1, &device)?;
            let residual = random(&[m, k], dtype, 2, &device)?;
            let norm = random(&[k], dtype, 3, &device)?;
            let mut bytes = Random(9);
            let weight: Vec<u8> = (0..n * k).map(|_| bytes.finite_code()).collect();
            let weight = candle_fp8::pack_weight(&codes(&weight, (n, k), &device)?)?;
            let scale = (random(&[n, 1], DType::F32, 4, &device)?.abs()? + 0.01)?;
            let bias = random(&[n], dtype, 5, &device)?;
            let weight = Weight {
                codes: Codes::Packed(&weight),
                scale: &scale,
                layout: ScaleLayout::Channel,
                bias: Some(&bias),
            };

            let mut list = Launches::new(&device)?;
            let stream = residual.force_contiguous()?;
            let normed = list
                .activations(m, k, dtype, quantization)?
                .expect("a launch makes it");
            list.rms_norm(&x, Some(&stream), (&norm, eps), &normed)?;
            let product = list.values(m, n, dtype)?;
            list.scaled_mm(&normed, weight, &product)?;
            let (gate, up) = (
                product.narrow(1, 0, n / 2)?,
                product.narrow(1, n / 2, n / 2)?,
            );
            let inner = list
                .activations(m, n / 2, dtype, quantization)?
                .expect("a launch makes it");
            list.silu_mul(&gate, &up, &inner)?;
            let plain = list
                .activations(m, k, dtype, quantization)?
                .expect("a launch makes it");
            if quantization.is_some() {
                list.quantize(&x, &plain)?;
            }
            assert_eq!(list.len(), if quantization.is_some() { 4 } else { 3 });

            let mut first = None;
            for run in 0..4 {
                // The residual stream is what a run changes.
                stream.slice_set(&residual.force_contiguous()?, 0, 0)?;
                list.run()?;
                let (sum, expected) = candle_fp8::add_rms_norm(&x, &residual, &norm, eps)?;
                assert_eq!(
                    values(&stream)?,
                    values(&sum)?,
                    "{what}, run {run}: the sum"
                );
                let results = [
                    made(&normed)?,
                    values(&product)?,
                    made(&inner)?,
                    made(&plain)?,
                ];
                let results =
                    results.map(|all| all.into_iter().map(f64::to_bits).collect::<Vec<_>>());
                let input = match quantization {
                    None => candle_fp8::Input::Full(&expected),
                    Some(quantization) => candle_fp8::Input::Quantize(&expected, quantization),
                };
                let expected = candle_fp8::scaled_mm(
                    input,
                    weight.codes,
                    weight.scale,
                    weight.layout,
                    weight.bias,
                )?;
                assert_near(&product, &expected, &format!("{what}, run {run}"))?;
                assert_eq!(
                    first.get_or_insert_with(|| results.clone()),
                    &results,
                    "{what}, run {run}"
                );
            }
        }
    }
    Ok(())
}

#[test]
fn positions_are_read_when_it_runs() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    let (dtype, eps) = (DType::BF16, 1e-5);
    for (batch, heads, kv_heads, dim, capacity) in [(1, 8, 2, 128, 300), (3, 4, 4, 64, 70)] {
        for with_norms in [false, true] {
            let (q_columns, kv_columns) = (heads * dim, kv_heads * dim);
            let qkv = random(&[batch, q_columns + 2 * kv_columns], dtype, 1, &device)?;
            let q = qkv.narrow(1, 0, q_columns)?;
            let k = qkv.narrow(1, q_columns, kv_columns)?;
            let v = qkv.narrow(1, q_columns + kv_columns, kv_columns)?;
            let cos = random(&[capacity, dim / 2], dtype, 2, &device)?;
            let sin = random(&[capacity, dim / 2], dtype, 3, &device)?;
            let weights = [4, 5].map(|seed| random(&[dim], dtype, seed, &device));
            let [q_weight, k_weight] = weights;
            let (q_weight, k_weight) = (q_weight?, k_weight?);
            let norms = with_norms.then_some(HeadNorms {
                q: &q_weight,
                k: &k_weight,
                eps,
            });
            let before = random(&[2, batch, kv_heads, capacity, dim], dtype, 6, &device)?;
            let cache = before.force_contiguous()?;
            let positions = Tensor::zeros(batch, DType::U32, &device)?;
            let scratch = AttentionScratch::new(&device)?;
            let mut list = Launches::new(&device)?;
            let (turned, out) = (
                list.values(batch, q_columns, dtype)?,
                list.values(batch, q_columns, dtype)?,
            );
            let heads_of = CacheHeads {
                cache: &cache,
                positions: &positions,
            };
            let rope = LaunchRope {
                norms,
                cos: &cos,
                sin: &sin,
            };
            list.rope_append([&q, &k, &v], rope, heads_of, &turned)?;
            let scale = 1.0 / (dim as f64).sqrt();
            list.attention(&turned, heads_of, None, scale, &scratch, &out)?;

            for position in [0, 7, capacity - 1, 33, 34] {
                let what = format!("{batch} {heads} {dim} {with_norms} at {position}");
                cache.slice_set(&before.force_contiguous()?, 0, 0)?;
                positions.slice_set(&Tensor::full(position as u32, batch, &device)?, 0, 0)?;
                list.run()?;

                let other = before.force_contiguous()?;
                let [q, k, v] = [&q, &k, &v].map(|x| x.unsqueeze(1));
                let (angle_cos, angle_sin) =
                    (cos.narrow(0, position, 1)?, sin.narrow(0, position, 1)?);
                let args = RopeAppend {
                    q: &q?,
                    k: &k?,
                    v: &v?,
                    norms,
                    cos: &angle_cos,
                    sin: &angle_sin,
                };
                let expected = candle_fp8::rope_append(&args, &other, position)?;
                assert_eq!(values(&turned)?, values(&expected)?, "{what}: queries");
                assert_eq!(values(&cache)?, values(&other)?, "{what}: cache");
                let cached = Cached {
                    cache: &other,
                    position,
                };
                let expected =
                    candle_fp8::attention_cached(&expected, cached, None, scale, &scratch)?;
                assert_eq!(values(&out)?, values(&expected)?, "{what}: attention");
            }
        }
    }
    Ok(())
}
