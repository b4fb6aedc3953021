//! Tiny models with made-up weights, under the names of a checkpoint.

pub(crate) mod naive;

use std::collections::HashMap;

use candle_compressed_tensors::{CtDenseLinear, CtLinear, LinearSource};
use candle_core::{DType, Device, Result, Tensor};
use candle_fp8_transformers::{Architecture, CausalLm, ModelConfig};
use candle_nn::VarBuilder;
use serde_json::{Value, json};

pub(crate) type Tensors = HashMap<String, Tensor>;

/// Linears straight from the `VarBuilder`.
pub(crate) struct Dense;

impl LinearSource for Dense {
    fn linear_b(&self, i: usize, o: usize, bias: bool, vb: VarBuilder) -> Result<CtLinear> {
        let linear = candle_nn::linear_b(i, o, bias, vb)?;
        CtDenseLinear::new(linear.weight().clone(), linear.bias().cloned()).map(CtLinear::Dense)
    }
}

/// A small config of each architecture, with groups of 2 query heads, and `changes` on top.
pub(crate) fn json_config(model_type: &str, changes: Value) -> Value {
    let mut config = json!({
        "model_type": model_type,
        "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "rms_norm_eps": 0.02, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": false, "eos_token_id": 2, "bos_token_id": 1,
    });
    let extra = match model_type {
        "mistral" => json!({ "head_dim": 8, "sliding_window": null }),
        "qwen3" => json!({ "head_dim": 10 }),
        "qwen3_moe" => json!({
            "head_dim": 10, "num_experts": 6, "num_experts_per_tok": 2,
            "moe_intermediate_size": 14, "norm_topk_prob": true, "mlp_only_layers": [1],
        }),
        "mixtral" => json!({ "num_local_experts": 5, "num_experts_per_tok": 2 }),
        _ => json!({}),
    };
    for source in [extra, changes] {
        for (key, value) in source.as_object().unwrap() {
            config[key] = value.clone();
        }
    }
    config
}

pub(crate) fn config(model_type: &str, changes: Value) -> ModelConfig {
    ModelConfig::from_json(&json_config(model_type, changes)).unwrap()
}

pub(crate) const MODEL_TYPES: [&str; 6] =
    ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral"];

/// A stream of numbers in [-1, 1) that is the same on every run (Knuth's MMIX generator).
pub(crate) struct Numbers(u64);

impl Numbers {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> f32 {
        self.0 = self
            .0
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (self.0 >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    pub(crate) fn tensor(&mut self, shape: &[usize], mean: f32, spread: f32) -> Tensor {
        let count = shape.iter().product();
        let values: Vec<f32> = (0..count).map(|_| mean + spread * self.next()).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }
}

/// Every tensor of the model, in F32, with decoder tensors under `prefix`.
pub(crate) fn tensors(config: &ModelConfig, prefix: &str) -> Tensors {
    let mut numbers = Numbers::new(7);
    let mut all = Tensors::new();
    let (h, d) = (config.hidden_size, config.head_dim);
    let (q, kv) = (
        config.num_attention_heads * d,
        config.num_key_value_heads * d,
    );
    let mut linear = |all: &mut Tensors, name: String, out: usize, inn: usize, bias: bool| {
        let spread = 2.0 / (inn as f32).sqrt();
        all.insert(
            format!("{name}.weight"),
            numbers.tensor(&[out, inn], 0.0, spread),
        );
        if bias {
            all.insert(format!("{name}.bias"), numbers.tensor(&[out], 0.0, 0.5));
        }
    };
    let mut norms = Numbers::new(11);
    let mut norm = |all: &mut Tensors, name: String, size: usize| {
        all.insert(format!("{name}.weight"), norms.tensor(&[size], 1.0, 0.3));
    };
    linear(
        &mut all,
        format!("{prefix}.embed_tokens"),
        config.vocab_size,
        h,
        false,
    );
    for i in 0..config.num_hidden_layers {
        let layer = format!("{prefix}.layers.{i}");
        let attention = format!("{layer}.self_attn");
        linear(
            &mut all,
            format!("{attention}.q_proj"),
            q,
            h,
            config.qkv_bias,
        );
        linear(
            &mut all,
            format!("{attention}.k_proj"),
            kv,
            h,
            config.qkv_bias,
        );
        linear(
            &mut all,
            format!("{attention}.v_proj"),
            kv,
            h,
            config.qkv_bias,
        );
        linear(&mut all, format!("{attention}.o_proj"), h, q, config.o_bias);
        if config.qk_norm {
            norm(&mut all, format!("{attention}.q_norm"), d);
            norm(&mut all, format!("{attention}.k_norm"), d);
        }
        norm(&mut all, format!("{layer}.input_layernorm"), h);
        norm(&mut all, format!("{layer}.post_attention_layernorm"), h);
        if config.is_sparse(i) {
            let moe = config.moe.as_ref().unwrap();
            let (e, inner) = (moe.num_experts, moe.intermediate_size);
            let mlp = format!("{layer}.{}", moe_name(config));
            linear(&mut all, format!("{mlp}.gate"), e, h, false);
            let mut stack = |name: &str, shape: &[usize]| {
                let tensor = Numbers::new(100 + i as u64 + shape[1] as u64).tensor(shape, 0.0, 0.4);
                all.insert(format!("{mlp}.experts.{name}"), tensor);
            };
            stack("gate_up_proj", &[e, 2 * inner, h]);
            stack("down_proj", &[e, h, inner]);
        } else {
            let inner = config.intermediate_size;
            linear(
                &mut all,
                format!("{layer}.mlp.gate_proj"),
                inner,
                h,
                config.mlp_bias,
            );
            linear(
                &mut all,
                format!("{layer}.mlp.up_proj"),
                inner,
                h,
                config.mlp_bias,
            );
            linear(
                &mut all,
                format!("{layer}.mlp.down_proj"),
                h,
                inner,
                config.mlp_bias,
            );
        }
    }
    norm(&mut all, format!("{prefix}.norm"), h);
    if config.tie_word_embeddings != Some(true) {
        linear(&mut all, "lm_head".to_string(), config.vocab_size, h, false);
    }
    all
}

pub(crate) fn moe_name(config: &ModelConfig) -> &'static str {
    match config.architecture {
        Architecture::Mixtral => "block_sparse_moe",
        _ => "mlp",
    }
}

pub(crate) fn var_builder(tensors: &Tensors, dtype: DType) -> VarBuilder<'static> {
    VarBuilder::from_tensors(tensors.clone(), dtype, &Device::Cpu)
}

pub(crate) fn build(config: &ModelConfig, tensors: &Tensors, dtype: DType) -> CausalLm {
    CausalLm::load(config, &Dense, var_builder(tensors, dtype)).unwrap()
}

/// A model of `model_type` with made-up weights.
pub(crate) fn model(model_type: &str, changes: Value, dtype: DType) -> (CausalLm, Tensors) {
    let config = config(model_type, changes);
    let tensors = tensors(&config, "model");
    (build(&config, &tensors, dtype), tensors)
}

/// `count` token ids below 61 that look random.
pub(crate) fn prompt(seed: u64, count: usize) -> Vec<u32> {
    let mut numbers = Numbers::new(seed);
    (0..count)
        .map(|_| ((numbers.next() + 1.0) * 30.0) as u32)
        .collect()
}

pub(crate) fn ids(prompts: &[Vec<u32>]) -> Tensor {
    let shape = (prompts.len(), prompts[0].len());
    Tensor::from_vec(prompts.concat(), shape, &Device::Cpu).unwrap()
}

/// Largest absolute difference; NaN counts as infinite.
pub(crate) fn difference(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.dims(), b.dims());
    let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    flat(a).into_iter().zip(flat(b)).fold(0.0, |worst, (a, b)| {
        let difference = (a - b).abs();
        if difference <= worst {
            worst
        } else if difference.is_nan() {
            f32::INFINITY
        } else {
            difference
        }
    })
}
