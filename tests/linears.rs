//! Every linear of every checkpoint, on the reference's own input, against the float64 script: in each activation mode.

// Each test binary uses its part of the shared module.
#[allow(dead_code, unreachable_pub)]
mod support;

use candle_compressed_tensors::{CtFp8Linear, CtLinear, QuantizerCompressedTensors};
use candle_core::{DType, Device, Tensor, Var};
use candle_fp8::ScaleLayout;
use candle_nn::Module;
use support::{Fixture, Mode, Reference, fixture, loadable, rows};

const FP8_MODES: [Mode; 3] = [Mode::AsCheckpoint, Mode::PerToken, Mode::Full];

fn linear(quantizer: &QuantizerCompressedTensors, name: &str) -> CtFp8Linear {
    let vb = quantizer
        .var_builder(DType::F32, &Device::Cpu)
        .unwrap()
        .pp(name);
    let shape = quantizer.plan().modules()[name].shape;
    let linear = match vb.contains_tensor("bias") {
        true => quantizer.linear(shape.1, shape.0, vb),
        false => quantizer.linear_no_bias(shape.1, shape.0, vb),
    };
    match linear.unwrap() {
        CtLinear::Fp8(linear) => linear,
        CtLinear::Dense(_) => panic!("{name} is not FP8"),
    }
}

/// How far an output may be from the exact one.
///
/// Both sides multiply the same codes and scales, and add them in another order and precision. With x̂ and ŵ the values
/// that the codes stand for, an f32 sum of K products is within (K + 8) · 2⁻²⁴ · Σ|x̂ ŵ| of the exact one (the 8 covers scale
/// products, bias and the reference's own cast), and |x̂| ≤ 2 |x| because no rounding to E4M3 more than doubles a value.
fn bounds(linear: &CtFp8Linear, x: &Tensor) -> Vec<Vec<f64>> {
    let scale_dtype = DType::F32;
    let dense = candle_fp8::dequantize(
        &linear.weight().unwrap(),
        linear.weight_scale(),
        linear.layout(),
        scale_dtype,
        DType::F32,
    );
    let (w, x) = (rows(&dense.unwrap()), rows(x));
    let bias = linear
        .bias()
        .map(|bias| bias.to_dtype(DType::F64).unwrap().to_vec1::<f64>().unwrap());
    let k = w[0].len() as f64;
    let magnitude = |x: &[f64], w: &[f64]| x.iter().zip(w).map(|(x, w)| (x * w).abs()).sum::<f64>();
    let bound = |x: &Vec<f64>, n: usize| {
        let bias = bias.as_ref().map_or(0., |bias| bias[n].abs());
        (k + 8.) * f64::powi(2., -24) * (2. * magnitude(x, &w[n]) + bias)
    };
    x.iter()
        .map(|x| (0..w.len()).map(|n| bound(x, n)).collect())
        .collect()
}

/// The largest difference in units of the bound: above 1 is wrong, and so is NaN.
fn excess(linear: &CtFp8Linear, x: &Tensor, expected: &Tensor) -> f64 {
    let (y, expected, bounds) = (
        rows(&linear.forward(x).unwrap()),
        rows(expected),
        rows_of(bounds(linear, x)),
    );
    let mut worst = 0f64;
    for ((y, expected), bound) in y
        .iter()
        .flatten()
        .zip(expected.iter().flatten())
        .zip(bounds)
    {
        let ratio = (y - expected).abs() / bound.max(f64::MIN_POSITIVE);
        if ratio.is_nan() {
            return f64::NAN;
        }
        worst = worst.max(ratio);
    }
    worst
}

fn rows_of(rows: Vec<Vec<f64>>) -> impl Iterator<Item = f64> {
    rows.into_iter().flatten()
}

fn output<'a>(reference: &'a Reference, name: &str, mode: Mode) -> &'a Tensor {
    reference.get(&format!("linear.{name}.output.{}", mode.name()))
}

#[test]
fn linears_agree_with_the_reference_in_every_mode() {
    let mut compared = 0;
    for fixture in loadable() {
        let reference = fixture.reference();
        for mode in FP8_MODES
            .into_iter()
            .filter(|mode| fixture.modes.contains(mode))
        {
            let quantizer = fixture.quantizer(mode);
            for name in reference.linears() {
                let x = reference.get(&format!("linear.{name}.input"));
                let excess = excess(
                    &linear(&quantizer, &name),
                    x,
                    output(&reference, &name, mode),
                );
                assert!(
                    excess <= 1.,
                    "{} {name} {}: {excess} times the bound",
                    fixture.name,
                    mode.name()
                );
                compared += 1;
            }
        }
    }
    assert!(compared > 500, "only {compared} outputs were compared");
}

/// A linear whose scales were changed by `mutate`.
fn mutant(
    linear: &CtFp8Linear,
    mutate: impl Fn(&Tensor) -> candle_core::Result<Tensor>,
) -> CtFp8Linear {
    let scale = mutate(linear.weight_scale())
        .and_then(|scale| scale.reshape(linear.weight_scale().shape()));
    CtFp8Linear::new(
        linear.weight().unwrap(),
        scale.unwrap().contiguous().unwrap(),
        linear.layout(),
        linear.bias().cloned(),
        linear.activations(),
    )
    .unwrap()
}

fn shifted(scale: &Tensor) -> candle_core::Result<Tensor> {
    let rows = scale.dim(0)?;
    Tensor::cat(&[scale.narrow(0, 1, rows - 1)?, scale.narrow(0, 0, 1)?], 0)
}

fn rejects(fixture: &Fixture, name: &str, what: &str, linear: &CtFp8Linear, mode: Mode) {
    let reference = fixture.reference();
    let x = reference.get(&format!("linear.{name}.input"));
    let excess = excess(linear, x, output(&reference, name, mode));
    assert!(
        excess > 1.,
        "{} {name}: {what} passes at {excess} times the bound",
        fixture.name
    );
}

#[test]
fn the_bound_rejects_misplaced_scales() {
    let mut rejected = 0;
    for fixture in loadable() {
        let quantizer = fixture.quantizer(Mode::AsCheckpoint);
        for name in fixture.reference().linears() {
            let linear = linear(&quantizer, &name);
            if linear.layout() == ScaleLayout::Tensor {
                continue;
            }
            if linear.weight_scale().dim(0).unwrap() > 1 {
                rejects(
                    &fixture,
                    &name,
                    "scales shifted by a row",
                    &mutant(&linear, shifted),
                    Mode::AsCheckpoint,
                );
                rejected += 1;
            }
            if matches!(linear.layout(), ScaleLayout::Block { .. })
                && linear.weight_scale().dims().iter().all(|dim| *dim > 1)
            {
                let transposed = mutant(&linear, |scale| scale.t()?.contiguous());
                rejects(
                    &fixture,
                    &name,
                    "scales transposed",
                    &transposed,
                    Mode::AsCheckpoint,
                );
                rejected += 1;
            }
        }
    }
    assert!(rejected > 100, "only {rejected} mutants");
}

#[test]
fn the_bound_rejects_the_wrong_activation_mode() {
    // Dynamic per token, static and block · group against each other and against unquantized activations.
    for name in [
        "llama-channel-token",
        "llama-tensor-static",
        "llama-block-group",
        "qwen2-tensor-static",
    ] {
        let fixture = fixture(name);
        let modes = match name {
            "llama-channel-token" => vec![Mode::AsCheckpoint, Mode::Full],
            _ => FP8_MODES.to_vec(),
        };
        for loaded in &modes {
            let quantizer = fixture.quantizer(*loaded);
            for linear_name in fixture.reference().linears() {
                let linear = linear(&quantizer, &linear_name);
                for other in modes.iter().filter(|mode| *mode != loaded) {
                    rejects(
                        &fixture,
                        &linear_name,
                        &format!("{loaded:?} for {other:?}"),
                        &linear,
                        *other,
                    );
                }
            }
        }
    }
}

#[test]
fn inputs_of_any_rank_and_dtype_give_outputs_of_the_same() {
    let fixture = fixture("llama-block-group");
    let reference = fixture.reference();
    let name = "model.layers.0.mlp.up_proj";
    let linear = linear(&fixture.quantizer(Mode::AsCheckpoint), name);
    let x = reference.get(&format!("linear.{name}.input"));
    let (m, k) = x.dims2().unwrap();
    let y = linear.forward(x).unwrap();
    for shape in [vec![m, k], vec![1, m, k], vec![2, m / 2, 1, k]] {
        let reshaped = linear
            .forward(&x.reshape(shape.as_slice()).unwrap())
            .unwrap();
        assert_eq!(reshaped.dims()[..shape.len() - 1], shape[..shape.len() - 1]);
        assert_eq!(
            rows(&reshaped.reshape(y.shape()).unwrap()),
            rows(&y),
            "{shape:?}"
        );
    }
    for dtype in [DType::BF16, DType::F16] {
        // The same values in another dtype: only the cast of the result may differ.
        let x = x.to_dtype(dtype).unwrap();
        let wide = linear
            .forward(&x.to_dtype(DType::F32).unwrap())
            .unwrap()
            .to_dtype(dtype)
            .unwrap();
        let narrow = linear.forward(&x).unwrap();
        assert_eq!(narrow.dtype(), dtype);
        assert_eq!(rows(&narrow), rows(&wide), "{dtype:?}");
    }
}

#[test]
fn dequantized_weights_are_bit_equal_to_compressed_tensors() {
    let mut compared = 0;
    for fixture in loadable() {
        let quantizer = fixture.quantizer(Mode::AsCheckpoint);
        for (name, expected) in fixture.reference().with_prefix("dequantized.") {
            let vb = quantizer.var_builder(DType::F32, &Device::Cpu).unwrap();
            let found = vb.get_with_hints_dtype(
                expected.shape(),
                name,
                Default::default(),
                expected.dtype(),
            );
            let bits = |tensor: &Tensor| {
                rows(tensor)
                    .concat()
                    .iter()
                    .map(|v| v.to_bits())
                    .collect::<Vec<_>>()
            };
            assert!(
                bits(&found.unwrap()) == bits(expected),
                "{} {name}",
                fixture.name
            );
            compared += 1;
        }
    }
    assert!(compared >= 35, "only {compared} weights were compared");
}

#[test]
fn a_bias_that_the_model_does_not_ask_for_is_an_error() {
    let quantizer = fixture("qwen2-channel-token").quantizer(Mode::AsCheckpoint);
    let name = "model.layers.0.self_attn.q_proj";
    let (out_dim, in_dim) = quantizer.plan().modules()[name].shape;
    let vb = quantizer.var_builder(DType::F32, &Device::Cpu).unwrap();
    let error = quantizer
        .linear_no_bias(in_dim, out_dim, vb.pp(name))
        .unwrap_err();
    assert!(
        error.to_string().contains("the checkpoint has a bias"),
        "{error}"
    );
}

#[test]
fn gradients_stop_at_fp8_with_an_error_and_flow_through_dequantized_linears() {
    let fixture = fixture("llama-channel-token");
    let name = "model.layers.0.mlp.up_proj";
    let x = fixture
        .reference()
        .get(&format!("linear.{name}.input"))
        .clone();
    let x = Var::from_tensor(&x).unwrap();
    for mode in FP8_MODES {
        let quantizer = fixture.quantizer(mode);
        assert!(!quantizer.is_trainable());
        let loss = linear(&quantizer, name)
            .forward(&x)
            .unwrap()
            .sum_all()
            .unwrap();
        let error = loss.backward().unwrap_err().to_string();
        assert!(
            error.contains("not trainable") && error.contains("dequantize"),
            "{error}"
        );
    }
    let quantizer = fixture.quantizer(Mode::Dequantized);
    assert!(quantizer.is_trainable());
    let (out_dim, in_dim) = quantizer.plan().modules()[name].shape;
    let vb = quantizer.var_builder(DType::F32, &Device::Cpu).unwrap();
    let dense = quantizer
        .linear_no_bias(in_dim, out_dim, vb.pp(name))
        .unwrap();
    let gradients = dense
        .forward(&x)
        .unwrap()
        .sum_all()
        .unwrap()
        .backward()
        .unwrap();
    // d(Σ y) / dx is the sum of the weight's rows, for every token.
    let expected = rows(&dense.weight().unwrap().sum_keepdim(0).unwrap()).remove(0);
    for row in rows(gradients.get(&x).unwrap()) {
        for (found, expected) in row.iter().zip(&expected) {
            assert!(
                (found - expected).abs() <= 1e-5 * (1. + expected.abs()),
                "{found} {expected}"
            );
        }
    }
}
