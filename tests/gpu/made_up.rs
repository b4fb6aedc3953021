//! Models with made-up weights, the same on every device, of sizes that the checkpoints do not have.

use candle_compressed_tensors::{CtFp8Linear, CtLinear, LinearSource};
use candle_core::{DType, Device, Result, Shape, Tensor};
use candle_fp8::{Quantization, Rounding, ScaleLayout, quantize_weight, weight_scale};
use candle_fp8_transformers::{CausalLm, ModelConfig};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};
use serde_json::{Value, json};

/// Numbers in -1..1 that a name decides on.
fn numbers(name: &str, shape: &Shape) -> Result<Tensor> {
    let seed = name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let mut state = seed;
    let values: Vec<f32> = (0..shape.elem_count())
        .map(|_| {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect();
    Tensor::from_vec(values, shape, &Device::Cpu)
}

/// Norms and embeddings.
struct Others;

impl SimpleBackend for Others {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: Init,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        let values = numbers(name, &shape)?;
        let values = match name.contains("norm") {
            true => ((values * 0.3)? + 1.0)?,
            false => values,
        };
        values.to_device(device)?.to_dtype(dtype)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> Result<Tensor> {
        candle_core::bail!("{name} is not there")
    }

    fn contains_tensor(&self, name: &str) -> bool {
        name == "model.embed_tokens.weight"
    }
}

struct Linears {
    layout: ScaleLayout,
    activations: Option<Quantization>,
}

impl LinearSource for Linears {
    fn linear_b(&self, k: usize, n: usize, bias: bool, vb: VarBuilder) -> Result<CtLinear> {
        let name = vb.prefix();
        let weight = (numbers(&name, &Shape::from((n, k)))? * (2.0 / (k as f64).sqrt()))?;
        let scale = weight_scale(&weight, self.layout, DType::F32)?;
        let codes = quantize_weight(&weight, &scale, self.layout, Rounding::Once)?;
        let bias = match bias {
            true => Some((numbers(&format!("{name}.bias"), &Shape::from(n))? * 0.5)?),
            false => None,
        };
        let to_dtype = |bias: Tensor| bias.to_device(vb.device())?.to_dtype(vb.dtype());
        let linear = CtFp8Linear::new(
            codes.to_device(vb.device())?,
            scale.to_device(vb.device())?,
            self.layout,
            bias.map(to_dtype).transpose()?,
            self.activations,
        );
        linear.map(CtLinear::Fp8)
    }
}

/// Three layers with heads of 64 or 128, which the fast kernels of attention take.
pub(crate) fn configs() -> [(&'static str, Value); 4] {
    [
        ("llama", json!({ "head_dim": 128 })),
        ("mistral", json!({ "head_dim": 64, "sliding_window": 13 })),
        (
            "qwen2",
            json!({ "num_attention_heads": 8, "hidden_size": 512 }),
        ),
        (
            "qwen3",
            json!({ "head_dim": 128, "num_key_value_heads": 4 }),
        ),
    ]
}

pub(crate) fn model(
    model_type: &str,
    changes: &Value,
    (layout, activations): (ScaleLayout, Option<Quantization>),
    dtype: DType,
    device: &Device,
) -> CausalLm {
    let mut config = json!({
        "model_type": model_type,
        "vocab_size": 300, "hidden_size": 512, "intermediate_size": 768, "num_hidden_layers": 3,
        "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": true, "eos_token_id": 2, "bos_token_id": 1,
    });
    for (key, value) in changes.as_object().expect("an object") {
        config[key] = value.clone();
    }
    let config = ModelConfig::from_json(&config).expect("a config");
    let vb = VarBuilder::from_backend(Box::new(Others), dtype, device.clone());
    let linears = Linears {
        layout,
        activations,
    };
    CausalLm::load(&config, &linears, vb).expect("a model")
}
