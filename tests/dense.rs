//! What a checkpoint leaves dense: BF16 matrices stay BF16 in memory on the CPU, in whatever dtype the model computes,
//! and compute what their widened copies would.

// Each test binary uses its part of the shared module.
#[allow(dead_code, unreachable_pub)]
mod support;

use candle_compressed_tensors::{
    Checkpoint, CtDenseLinear, CtLinear, LinearSource, QuantizerCompressedTensors,
};
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_fp8_transformers::{CausalLm, ModelConfig};
use candle_nn::{Module, VarBuilder};
use support::{
    Fixture, Mode, bound::largest, changed, fixture, loadable, logits, max_difference, rows,
};

/// Dense weights in the dtype that the model computes in, as they were read from the file.
struct Widened(QuantizerCompressedTensors);

impl LinearSource for Widened {
    fn linear_b(&self, i: usize, o: usize, bias: bool, vb: VarBuilder) -> Result<CtLinear> {
        let dtype = vb.dtype();
        Ok(match self.0.linear_b(i, o, bias, vb)? {
            CtLinear::Dense(linear) => CtLinear::Dense(CtDenseLinear::new(
                linear.weight().to_dtype(dtype)?,
                linear.bias().cloned(),
            )?),
            fp8 => fp8,
        })
    }
}

fn load(checkpoint: &Checkpoint, source: &dyn LinearSource, vb: VarBuilder) -> CausalLm {
    let config = ModelConfig::from_json(checkpoint.config()).unwrap();
    CausalLm::load(&config, source, vb).unwrap()
}

fn load_as(fixture: &Fixture, mode: Mode, dtype: DType) -> CausalLm {
    let quantizer = fixture.quantizer(mode);
    let vb = quantizer.var_builder(dtype, &Device::Cpu).unwrap();
    load(&fixture.checkpoint(), &quantizer, vb)
}

#[test]
fn matrices_stored_in_bf16_stay_bf16() {
    let (mut matrices, mut heads) = (0, 0);
    for fixture in loadable() {
        let checkpoint = fixture.checkpoint();
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let state = load_as(&fixture, Mode::AsCheckpoint, dtype).state();
            for name in state.names() {
                let tensor = &state.get(name).unwrap().tensor().unwrap();
                let stored = checkpoint.info(name).map(|info| info.dtype);
                let expected = match stored {
                    _ if name.ends_with("_scale") => continue,
                    Some(safetensors::Dtype::F8_E4M3) => DType::F8E4M3,
                    Some(safetensors::Dtype::BF16) if tensor.rank() == 2 => DType::BF16,
                    // Norms, biases and merged experts.
                    _ => dtype,
                };
                assert_eq!(
                    tensor.dtype(),
                    expected,
                    "{} in {dtype:?}: {name}",
                    fixture.name
                );
                matrices += usize::from(expected == DType::BF16 && tensor.rank() == 2);
                heads += usize::from(name == "lm_head.weight" && expected == DType::BF16);
            }
        }
    }
    assert!(
        matrices > 100 && heads > 60,
        "{matrices} matrices, {heads} heads"
    );
}

#[test]
fn what_is_dequantized_gets_the_dtype_of_the_model() {
    let fixture = fixture("llama-channel-token");
    let model = load_as(&fixture, Mode::Dequantized, DType::F32);
    for (name, linear) in model.linears() {
        let expected = match name.as_str() {
            "lm_head" => DType::BF16,
            _ => DType::F32,
        };
        assert_eq!(linear.weight().unwrap().dtype(), expected, "{name}");
    }
}

/// Both add products of the same numbers in f32, in another order: an f32 sum of K products is within K · 2⁻²⁴ · Σ|x w|
/// of the exact one. The result's own rounding comes on top.
#[test]
fn a_bf16_head_computes_what_its_widened_copy_would() {
    let fixture = fixture("llama-channel-token");
    let model = load_as(&fixture, Mode::AsCheckpoint, DType::F32);
    let (_, head) = model.linears().find(|(name, _)| name == "lm_head").unwrap();
    assert_eq!(head.weight().unwrap().dtype(), DType::BF16);
    let wide = head.weight().unwrap().to_dtype(DType::F32).unwrap();
    let k = wide.dim(1).unwrap();
    for (dtype, half_ulp) in [(DType::F32, 24), (DType::BF16, 8), (DType::F16, 11)] {
        for m in [1, 2, 7, 33] {
            let x = Tensor::randn(0f32, 1., (m, k), &Device::Cpu).unwrap();
            let x = x.to_dtype(dtype).unwrap();
            let y = head.forward(&x).unwrap();
            assert_eq!((y.dtype(), y.dims()[0]), (dtype, m));
            let x = rows(&x);
            for (x, y) in x.iter().zip(rows(&y)) {
                for (w, y) in rows(&wide).iter().zip(y) {
                    let products = || x.iter().zip(w).map(|(x, w)| x * w);
                    let exact: f64 = products().sum();
                    let magnitude: f64 = products().map(f64::abs).sum();
                    let bound = (k as f64) * f64::powi(2., -24) * magnitude
                        + 1.01 * f64::powi(2., -half_ulp) * exact.abs()
                        + f64::powi(2., -25); // F16's smallest steps
                    let error = (y - exact).abs();
                    assert!(
                        error <= bound,
                        "{dtype:?}, {m} rows: {error:.2e} > {bound:.2e}"
                    );
                }
            }
        }
    }
}

/// Embedding, heads of their own and tied ones, routers: the whole model, against one that has them widened.
#[test]
fn models_compute_what_their_widened_copies_would() {
    for name in [
        "llama-channel-token",
        "qwen2-channel-token",
        "qwen3-moe-channel",
        "llama-tensor-static",
    ] {
        let fixture = fixture(name);
        let checkpoint = fixture.checkpoint();
        // Without activations in FP8, whose codes an ulp of f32 can turn.
        let quantizer = fixture.quantizer(Mode::Full);
        let vb = || quantizer.var_builder(DType::F32, &Device::Cpu).unwrap();
        let resident = load(&checkpoint, &quantizer, vb());
        let widened = load(&checkpoint, &Widened(quantizer.clone()), vb());
        assert!(resident.weight_bytes() < widened.weight_bytes());
        let ids = fixture.reference().ids("input_ids");
        let expected = logits(&widened, &ids);
        let error = max_difference(&logits(&resident, &ids), &expected);
        assert!(error <= 1e-5 * largest(&expected), "{name}: {error}");
    }
}

/// The config says tied, and the file has an `lm_head.weight` all the same.
#[test]
fn a_head_that_repeats_the_embedding_is_not_loaded() {
    for (what, change) in [("equal", 0u8), ("different", 1)] {
        let dir = changed(
            "llama-channel-token",
            &format!("dense-head-{what}"),
            |tensors, config| {
                config["tie_word_embeddings"] = true.into();
                let mut head = tensors["model.embed_tokens.weight"].clone();
                *head.bytes.last_mut().unwrap() ^= change;
                tensors.insert("lm_head.weight".into(), head);
            },
        );
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let quantizer =
            QuantizerCompressedTensors::new(&checkpoint, Mode::AsCheckpoint.options()).unwrap();
        let vb = || quantizer.var_builder(DType::F32, &Device::Cpu).unwrap();
        // Under names that the file does not have, values are compared instead of bytes.
        let renamed = vb().rename_f(|name| name.trim_start_matches("outer.").to_string());
        for vb in [vb(), renamed.pp("outer")] {
            let model = load(&checkpoint, &quantizer, vb);
            let own = model.linears().any(|(name, _)| name.ends_with("lm_head"));
            assert_eq!(own, change == 1, "{what}");
        }
    }
}

#[test]
fn gradients_flow_through_bf16_linears() {
    let cpu = &Device::Cpu;
    let values = |shape: (usize, usize)| Tensor::randn(0f32, 1., shape, cpu).unwrap();
    let round = |tensor: Tensor| tensor.to_dtype(DType::BF16).unwrap();
    // Of `Σ y · g`, with and without the BF16 form, for values that both can hold.
    let (x, w, g) = (round(values((5, 6))), round(values((4, 6))), values((5, 4)));
    let bias = round(values((1, 4))).squeeze(0).unwrap();
    for dtype in [DType::F32, DType::BF16] {
        let gradients = |of_weight: DType| {
            let var = |tensor: &Tensor, dtype| {
                Var::from_tensor(&tensor.to_dtype(dtype).unwrap()).unwrap()
            };
            let (x, w, bias) = (var(&x, dtype), var(&w, of_weight), var(&bias, dtype));
            let linear =
                CtDenseLinear::new(w.as_tensor().clone(), Some(bias.as_tensor().clone())).unwrap();
            let y = linear.forward(&x).unwrap().to_dtype(DType::F32).unwrap();
            let store = (y * &g).unwrap().sum_all().unwrap().backward().unwrap();
            [x, w, bias].map(|var| {
                let gradient = store.get(&var).expect("a gradient");
                assert_eq!(gradient.dtype(), var.dtype());
                let gradient = gradient.to_dtype(DType::F64).unwrap();
                gradient.flatten_all().unwrap().to_vec1::<f64>().unwrap()
            })
        };
        let found = gradients(DType::BF16);
        let expected = gradients(dtype);
        for (found, expected) in found.iter().zip(&expected) {
            for (found, expected) in found.iter().zip(expected) {
                // Rounded to BF16 a few times; a wrong factor is far away.
                let bound = 0.02 * (1. + expected.abs());
                assert!((found - expected).abs() <= bound, "{found} {expected}");
            }
        }
    }
}

#[test]
fn a_bias_of_another_size_is_an_error() {
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::BF16, &Device::Cpu).unwrap();
    let error = CtDenseLinear::new(zeros(&[4, 3]), Some(zeros(&[3]))).unwrap_err();
    assert!(error.to_string().contains("[4]"), "{error}");
    assert!(CtDenseLinear::new(zeros(&[4]), None).is_err());
}
