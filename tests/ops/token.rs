//! What a token needs beside its linears, against the oracle: by the kernels, and composed of Candle's ops, which is what
//! runs where gradients are asked for and on other devices.

use crate::devices::everywhere;
use crate::oracle::{Float, token};
use candle_core::{D, DType, Device, IndexOp, Result, Tensor, Var};
use candle_fp8::{AttentionScratch, Cached, HeadNorms, RopeAppend};

const FLOATS: [(DType, Float); 3] = [
    (DType::F32, Float::F32),
    (DType::BF16, Float::Bf16),
    (DType::F16, Float::F16),
];

/// Values of the dtype in `-range..range`, the same every time.
fn values_on(
    device: &Device,
    shape: &[usize],
    range: f64,
    dtype: DType,
    seed: usize,
) -> Result<Tensor> {
    let n: usize = shape.iter().product();
    let value = |i: usize| {
        let mixed = (i + 1).wrapping_mul(2_654_435_761 + 2 * seed) >> 7;
        (((mixed % 20_011) as f64 / 10_005.5 - 1.0) * range) as f32
    };
    let values: Vec<f32> = (0..n).map(value).collect();
    Tensor::from_vec(values, shape, device)?.to_dtype(dtype)
}

fn values(shape: &[usize], range: f64, dtype: DType, seed: usize) -> Result<Tensor> {
    values_on(&Device::Cpu, shape, range, dtype, seed)
}

fn read(tensor: &Tensor) -> Result<Vec<f64>> {
    let tensor = tensor.to_device(&Device::Cpu)?;
    tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
}

/// Fails where a result is further from the oracle's than `roundings` of its own dtype, `f32_error` of `size`, allow.
fn check(what: &str, found: &Tensor, expected: &[f64], float: Float, roundings: f64, slack: f64) {
    let found = read(found).unwrap();
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let bound = expected.abs() * roundings * float.unit_roundoff() + slack + float.min_step();
        let error = (found - expected).abs();
        assert!(
            error <= bound,
            "{what} {float:?}: element {i} is {found}, not {expected}"
        );
    }
}

/// As it is, and as a variable.
fn both(x: &Tensor) -> Result<[(&'static str, Tensor); 2]> {
    let var = Var::from_tensor(x)?.as_tensor().clone();
    Ok([("kernel", x.clone()), ("composed", var)])
}

#[test]
fn rms_norm() -> Result<()> {
    everywhere(|device| {
        for (dtype, float) in FLOATS {
            for (lead, k) in [
                (vec![1, 1], 2048),
                (vec![3], 70),
                (vec![2, 40], 1000),
                (vec![], 5),
            ] {
                let shape = [lead.as_slice(), &[k]].concat();
                let x = values_on(device, &shape, 3.0, dtype, 1)?;
                let residual = values_on(device, &shape, 2.0, dtype, 2)?;
                let weight = values_on(device, &[k], 1.5, dtype, 3)?;
                let (wide, eps) = (read(&weight)?, 1e-5);
                // One rounding that may tip over and one of the result; sums of k squares.
                let slack = 4.0 * (k as f64 / 64.0 + 8.0) * 2f64.powi(-24);
                for (how, x) in both(&x)? {
                    let y = candle_fp8::rms_norm(&x, &weight, eps)?;
                    assert_eq!((y.dims(), y.dtype()), (&shape[..], dtype));
                    let expected = token::rms_norm(&read(&x)?, &wide, eps, float);
                    check(how, &y, &expected, float, 3.0, slack);

                    let (sum, y) = candle_fp8::add_rms_norm(&x, &residual, &weight, eps)?;
                    let sums = read(&x)?.into_iter().zip(read(&residual)?);
                    let sums: Vec<f64> = sums.map(|(x, r)| float.round(x + r)).collect();
                    assert_eq!(read(&sum)?, sums, "{how}: the sum is exact, rounded once");
                    let expected = token::rms_norm(&sums, &wide, eps, float);
                    check(how, &y, &expected, float, 3.0, slack);
                }
            }
        }
        Ok(())
    })
}

#[test]
fn silu_mul() -> Result<()> {
    everywhere(|device| {
        for (dtype, float) in FLOATS {
            let gate = values_on(device, &[3, 5, 700], 12.0, dtype, 1)?;
            let up = values_on(device, &[3, 5, 700], 3.0, dtype, 2)?;
            let expected = token::silu_mul(&read(&gate)?, &read(&up)?);
            for (how, gate) in both(&gate)? {
                let y = candle_fp8::silu_mul(&gate, &up)?;
                assert_eq!((y.dims(), y.dtype()), (gate.dims(), dtype));
                check(
                    how,
                    &y,
                    &expected,
                    float,
                    1.0 + 7.0 * 2f64.powi(-24) / float.unit_roundoff(),
                    1e-9,
                );
            }
        }
        Ok(())
    })
}

#[test]
fn rope() -> Result<()> {
    everywhere(|device| {
        for (dtype, float) in FLOATS {
            for [b, l, h, d] in [[1, 1, 32, 64], [2, 7, 3, 6], [1, 40, 20, 128], [1, 3, 1, 2]] {
                let x = values_on(device, &[b, l, h, d], 3.0, dtype, 1)?;
                let cos = values_on(device, &[l, d / 2], 1.0, dtype, 2)?;
                let sin = values_on(device, &[l, d / 2], 1.0, dtype, 3)?;
                let expected = token::rope(&read(&x)?, [b, l, h, d], &read(&cos)?, &read(&sin)?);
                for (how, x) in both(&x)? {
                    let y = candle_fp8::rope(&x, &cos, &sin)?;
                    assert_eq!((y.dims(), y.dtype()), (x.dims(), dtype));
                    check(how, &y, &expected, float, 1.0, 12.0 * 2f64.powi(-24));
                }
            }
        }
        Ok(())
    })
}

/// What tensor cores make of attention's weights, which they take in the dtype of the values: each is off by a
/// rounding, and so is their sum; values are up to 2.
fn of_weights(device: &Device, float: Float) -> f64 {
    match device {
        Device::Cpu => 0.0,
        _ => 4.0 * float.unit_roundoff(),
    }
}

#[test]
fn attention_over_a_cache() -> Result<()> {
    everywhere(|device| {
        // B, L, T, Hq, Hkv, D, window
        type Case = (usize, usize, usize, usize, usize, usize, Option<usize>);
        let cases: [Case; 10] = [
            (1, 1, 1, 1, 1, 64, None),
            (1, 1, 130, 32, 8, 64, None),
            (2, 1, 700, 4, 2, 16, None),
            (1, 1, 700, 4, 4, 40, Some(100)),
            (1, 7, 7, 6, 2, 20, None),
            (2, 3, 90, 6, 2, 128, Some(5)),
            (1, 40, 40, 8, 2, 64, None),
            (2, 33, 200, 3, 1, 24, None),
            (1, 300, 310, 4, 2, 8, Some(70)),
            (1, 300, 300, 2, 2, 8, None),
        ];
        for (dtype, float) in FLOATS {
            for (b, l, t, hq, hkv, d, window) in cases {
                let q = values_on(device, &[b, l, hq, d], 2.0, dtype, 1)?;
                // What lies beyond the cache's filled part must not matter.
                let room = |seed| -> Result<Tensor> {
                    let filled = values_on(device, &[b, hkv, t, d], 2.0, dtype, seed)?;
                    let rest = Tensor::full(f32::NAN, (b, hkv, 9, d), device)?;
                    Tensor::cat(&[&filled, &rest.to_dtype(dtype)?], 2)
                };
                let (keys, values) = (room(2)?.narrow(2, 0, t)?, room(3)?.narrow(2, 0, t)?);
                let scale = 1.0 / (d as f64).sqrt();
                let (wide_q, wide_k) = (read(&q)?, read(&keys)?);
                let sizes = ([b, l, hq, d], [b, hkv, t, d]);
                let (q_side, k_side) = ((&wide_q[..], sizes.0), (&wide_k[..], sizes.1));
                let expected = token::attention(q_side, k_side, &read(&values)?, window, scale);
                // A score of up to 4 √D is off by D roundings; values are up to 2.
                let score = 4.0 * (d as f64).sqrt() * (d as f64 + 4.0);
                let slack = 4.0 * (score + t as f64 / 8.0) * 2f64.powi(-24);
                let slack = slack + of_weights(device, float);
                for (how, q) in both(&q)? {
                    let y = candle_fp8::attention(&q, &keys, &values, window, scale)?;
                    assert_eq!((y.dims(), y.dtype()), (q.dims(), dtype));
                    check(how, &y, &expected, float, 1.0, slack);
                }
            }
        }
        Ok(())
    })
}

#[test]
fn attention_over_one_tensor_for_keys_and_values() -> Result<()> {
    everywhere(|device| {
        // B, L, position, capacity, Hq, Hkv, D, window
        type Case = (
            usize,
            usize,
            usize,
            usize,
            usize,
            usize,
            usize,
            Option<usize>,
        );
        let cases: [Case; 6] = [
            (1, 1, 0, 1, 4, 2, 64, None),
            (1, 1, 400, 700, 32, 8, 128, None),
            (2, 1, 90, 300, 4, 4, 20, Some(7)),
            (1, 5, 31, 300, 8, 2, 64, None),
            (2, 70, 0, 70, 4, 1, 128, None),
            (2, 130, 60, 400, 6, 2, 64, Some(40)),
        ];
        // One for all calls, as a model has it.
        let scratch = AttentionScratch::new(device)?;
        for (dtype, float) in FLOATS {
            for (b, l, position, capacity, hq, hkv, d, window) in cases {
                let q = values_on(device, &[b, l, hq, d], 2.0, dtype, 1)?;
                let t = position + l;
                let filled = values_on(device, &[2, b, hkv, t, d], 2.0, dtype, 2)?;
                // What lies beyond the cache's filled part must not matter.
                let cache = match capacity - t {
                    0 => filled.clone(),
                    rest => {
                        let rest = Tensor::full(f32::NAN, (2, b, hkv, rest, d), device)?;
                        Tensor::cat(&[&filled, &rest.to_dtype(dtype)?], 3)?
                    }
                };
                let scale = 1.0 / (d as f64).sqrt();
                let (wide_q, keys) = (read(&q)?, read(&filled.i(0)?)?);
                let sizes = ([b, l, hq, d], [b, hkv, t, d]);
                let (q_side, k_side) = ((&wide_q[..], sizes.0), (&keys[..], sizes.1));
                let values = read(&filled.i(1)?)?;
                let expected = token::attention(q_side, k_side, &values, window, scale);
                let score = 4.0 * (d as f64).sqrt() * (d as f64 + 4.0);
                let slack = 4.0 * (score + t as f64 / 8.0) * 2f64.powi(-24);
                let slack = slack + of_weights(device, float);
                let cached = Cached {
                    cache: &cache,
                    position,
                };
                for (how, q) in both(&q)? {
                    let y = candle_fp8::attention_cached(&q, cached, window, scale, &scratch)?;
                    assert_eq!((y.dims(), y.dtype()), (q.dims(), dtype));
                    check(how, &y, &expected, float, 1.0, slack);
                }
            }
        }
        Ok(())
    })
}

#[test]
fn rope_and_cache() -> Result<()> {
    everywhere(|device| {
        // B, L, position, capacity, Hq, Hkv, D
        let cases = [
            [1, 1, 0, 1, 4, 2, 64],
            [1, 1, 37, 50, 32, 8, 128],
            [2, 3, 5, 8, 3, 1, 6],
            [2, 70, 10, 100, 4, 4, 20],
            [3, 33, 0, 40, 6, 2, 64],
        ];
        for (dtype, float) in FLOATS {
            for [b, l, position, capacity, hq, hkv, d] in cases {
                // As one product for all three gives them.
                let qkv = values_on(device, &[b, l, (hq + 2 * hkv) * d], 3.0, dtype, 1)?;
                let q = qkv.narrow(2, 0, hq * d)?;
                let k = qkv.narrow(2, hq * d, hkv * d)?;
                let v = qkv.narrow(2, (hq + hkv) * d, hkv * d)?;
                let cos = values_on(device, &[l, d / 2], 1.0, dtype, 2)?;
                let sin = values_on(device, &[l, d / 2], 1.0, dtype, 3)?;
                let weights = [4, 5].map(|seed| values_on(device, &[d], 1.5, dtype, seed));
                let [q_weight, k_weight] = weights;
                let (q_weight, k_weight) = (q_weight?, k_weight?);
                let norms = HeadNorms {
                    q: &q_weight,
                    k: &k_weight,
                    eps: 1e-5,
                };
                let before = values_on(device, &[2, b, hkv, capacity, d], 1.0, dtype, 6)?;
                for norms in [None, Some(norms)] {
                    let cache = before.force_contiguous()?;
                    let args = RopeAppend {
                        q: &q,
                        k: &k,
                        v: &v,
                        norms,
                        cos: &cos,
                        sin: &sin,
                    };
                    let found = candle_fp8::rope_append(&args, &cache, position)?;
                    assert_eq!((found.dims(), found.dtype()), (&[b, l, hq, d][..], dtype));

                    let turned = |x: &Tensor, heads, weight| -> Result<Vec<f64>> {
                        let mut x = read(x)?;
                        if norms.is_some() {
                            x = token::rms_norm(&x, &read(weight)?, 1e-5, float);
                            x.iter_mut().for_each(|x| *x = float.round(*x));
                        }
                        let (cos, sin) = (read(&cos)?, read(&sin)?);
                        Ok(token::rope(&x, [b, l, heads, d], &cos, &sin))
                    };
                    // A norm may round the other way, which is one rounding of each of two factors near 4.
                    let (roundings, slack) = match norms {
                        None => (1.0, 12.0 * 2f64.powi(-24)),
                        Some(_) => (1.0, 40.0 * float.unit_roundoff() + 100.0 * 2f64.powi(-24)),
                    };
                    let what = format!("{b} {l} {position} {hq} {hkv} {d}, q");
                    let expected = turned(&q, hq, &q_weight)?;
                    check(&what, &found, &expected, float, roundings, slack);

                    // [B, L, Hkv, D] as it lies in the cache.
                    let written = cache.narrow(3, position, l)?.transpose(2, 3)?;
                    let expected = turned(&k, hkv, &k_weight)?;
                    let keys = written.i(0)?.contiguous()?;
                    check(
                        &format!("{what}, keys"),
                        &keys,
                        &expected,
                        float,
                        roundings,
                        slack,
                    );
                    assert_eq!(read(&written.i(1)?)?, read(&v)?, "{what}, values");
                    for (start, len) in [(0, position), (position + l, capacity - position - l)] {
                        let [now, then] = [&cache, &before].map(|x| x.narrow(3, start, len));
                        assert_eq!(read(&now?)?, read(&then?)?, "{what}, the rest");
                    }
                }
            }
        }
        Ok(())
    })
}

/// A tensor of the same values with its last two axes swapped in memory.
fn strided(x: &Tensor) -> Result<Tensor> {
    let y = x.transpose(D::Minus1, D::Minus2)?.contiguous()?;
    y.transpose(D::Minus1, D::Minus2)
}

#[test]
fn strides_do_not_matter() -> Result<()> {
    everywhere(|device| {
        let dtype = DType::BF16;
        let same = |a: Tensor, b: Tensor| -> Result<()> {
            assert_eq!(read(&a)?, read(&b)?);
            Ok(())
        };
        let x = values_on(device, &[2, 6, 4, 10], 2.0, dtype, 1)?;
        let other = values_on(device, &[2, 6, 4, 10], 2.0, dtype, 2)?;
        let (s, o) = (strided(&x)?, strided(&other)?);
        assert!(!s.is_contiguous());
        let weight = values_on(device, &[10], 2.0, dtype, 3)?;
        same(
            candle_fp8::rms_norm(&s, &weight, 1e-6)?,
            candle_fp8::rms_norm(&x, &weight, 1e-6)?,
        )?;
        let (a, b) = (
            candle_fp8::add_rms_norm(&s, &o, &weight, 1e-6)?,
            candle_fp8::add_rms_norm(&x, &other, &weight, 1e-6)?,
        );
        same(a.0, b.0)?;
        same(a.1, b.1)?;
        same(
            candle_fp8::silu_mul(&s, &o)?,
            candle_fp8::silu_mul(&x, &other)?,
        )?;
        let angles = values_on(device, &[6, 5], 1.0, dtype, 4)?;
        same(
            candle_fp8::rope(&s, &strided(&angles)?, &angles)?,
            candle_fp8::rope(&x, &angles, &angles)?,
        )?;
        let (keys, values) = (other.transpose(1, 2)?, x.transpose(1, 2)?);
        same(
            candle_fp8::attention(&s, &strided(&keys)?, &strided(&values)?, None, 0.3)?,
            candle_fp8::attention(&x, &keys.contiguous()?, &values.contiguous()?, None, 0.3)?,
        )
    })
}

#[test]
fn gradients_pass() -> Result<()> {
    let x = Var::from_tensor(&values(&[1, 3, 2, 4], 2.0, DType::F32, 1)?)?;
    let plain = values(&[1, 3, 2, 4], 2.0, DType::F32, 2)?;
    let (weight, angles) = (
        Tensor::ones(4, DType::F32, &Device::Cpu)?,
        plain.narrow(3, 0, 2)?,
    );
    let angles = angles.narrow(2, 0, 1)?.reshape((3, 2))?;
    let keys = plain.transpose(1, 2)?;
    for y in [
        candle_fp8::rms_norm(&x, &weight, 1e-6)?,
        candle_fp8::add_rms_norm(&x, &plain, &weight, 1e-6)?.1,
        candle_fp8::silu_mul(&plain, &x)?,
        candle_fp8::rope(&x, &angles, &angles)?,
        candle_fp8::attention(&x, &keys, &keys, None, 1.0)?,
    ] {
        let gradients = (y * &plain)?.sum_all()?.backward()?;
        let gradient = gradients.get(&x).expect("a gradient");
        assert!(gradient.abs()?.sum_all()?.to_scalar::<f32>()? > 0.0);
    }
    Ok(())
}

#[test]
fn what_does_not_fit_is_refused() -> Result<()> {
    let float = |shape: &[usize]| values(shape, 1.0, DType::F32, 1);
    let refused = |result: Result<Tensor>, tensor: &str| {
        let text = result.unwrap_err().to_string();
        assert!(text.contains(tensor), "{text}");
    };
    let x = float(&[2, 3, 4, 8])?;
    let half = x.to_dtype(DType::BF16)?;
    refused(candle_fp8::rms_norm(&x, &float(&[7])?, 1e-6), "weight");
    refused(candle_fp8::rms_norm(&half, &float(&[8])?, 1e-6), "weight");
    refused(
        candle_fp8::rms_norm(&x.to_dtype(DType::F64)?, &float(&[8])?, 1e-6),
        "x",
    );
    let added = candle_fp8::add_rms_norm(&x, &float(&[3, 4, 8])?, &float(&[8])?, 1e-6);
    refused(added.map(|(sum, _)| sum), "residual");
    refused(candle_fp8::silu_mul(&x, &float(&[2, 3, 8, 4])?), "up");
    refused(candle_fp8::silu_mul(&x, &half), "up");
    let angles = float(&[3, 4])?;
    refused(candle_fp8::rope(&x, &float(&[4, 3])?, &angles), "cos");
    refused(candle_fp8::rope(&half, &angles, &angles), "cos");
    refused(
        candle_fp8::rope(&float(&[2, 3, 4, 7])?, &angles, &angles),
        "x",
    );
    let keys = float(&[2, 2, 5, 8])?;
    for wrong in [[1, 2, 5, 8], [2, 3, 5, 8], [2, 2, 2, 8], [2, 2, 5, 4]] {
        let keys = float(&wrong)?;
        refused(candle_fp8::attention(&x, &keys, &keys, None, 1.0), "keys");
    }
    let longer = float(&[2, 2, 6, 8])?;
    refused(
        candle_fp8::attention(&x, &keys, &longer, None, 1.0),
        "values",
    );
    refused(
        candle_fp8::attention(&half, &keys, &keys, None, 1.0),
        "keys",
    );
    refused(
        candle_fp8::attention(&x, &keys, &keys, Some(0), 1.0),
        "window",
    );
    let cache = float(&[2, 2, 2, 6, 8])?;
    let scratch = AttentionScratch::new(&Device::Cpu)?;
    let cached = |cache: &Tensor, position| {
        let cached = Cached { cache, position };
        candle_fp8::attention_cached(&x, cached, None, 1.0, &scratch)
    };
    cached(&cache, 3)?;
    refused(cached(&cache, 4), "cache");
    refused(cached(&cache, usize::MAX), "cache");
    refused(cached(&cache.to_dtype(DType::BF16)?, 0), "cache");
    refused(cached(&float(&[2, 2, 3, 6, 8])?, 0), "cache");
    let heads = x.reshape((2, 3, 32))?;
    let append = |q: &Tensor, k: &Tensor, cache: &Tensor, position| {
        let args = RopeAppend {
            q,
            k,
            v: k,
            norms: None,
            cos: &angles,
            sin: &angles,
        };
        candle_fp8::rope_append(&args, cache, position)
    };
    let k = heads.narrow(2, 0, 16)?;
    append(&heads, &k, &cache, 3)?;
    refused(append(&heads, &k, &cache, 4), "position");
    refused(append(&heads, &heads, &cache, 0), "k");
    refused(append(&heads.narrow(2, 0, 24)?, &k, &cache, 0), "q");
    refused(append(&half.reshape((2, 3, 32))?, &k, &cache, 0), "cache");
    refused(append(&heads, &k, &cache.transpose(2, 3)?, 0), "cache");
    Ok(())
}
