//! Published configs, both spellings of RoPE, and what is refused.

use crate::common::json_config;
use candle_core::DType;
use candle_fp8_transformers::{
    Architecture, Error, GenerationConfig, ModelConfig, RopeScaling, stock,
};
use serde_json::{Value, json};

fn parse(config: Value) -> ModelConfig {
    ModelConfig::from_json(&config).unwrap()
}

fn llama_3_1_8b() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3"
        },
        "rope_theta": 500000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        "use_cache": true, "vocab_size": 128256
    })
}

#[test]
fn llama() {
    let config = parse(llama_3_1_8b());
    assert_eq!(config.architecture, Architecture::Llama);
    assert_eq!(
        (
            config.head_dim,
            config.num_key_value_heads,
            config.vocab_size
        ),
        (128, 8, 128256)
    );
    assert_eq!(config.rope.theta, 500000.0);
    let llama3 = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };
    assert_eq!(config.rope.scaling, llama3);
    assert_eq!(config.eos_token_ids, [128001, 128008, 128009].into());
    assert_eq!(config.tie_word_embeddings, Some(false));
    assert!(!config.qkv_bias && !config.o_bias && !config.mlp_bias && !config.qk_norm);
    assert_eq!(config.sliding_windows, [None; 32]);
    assert_eq!(config.dtype, Some(DType::BF16));
    assert_eq!(config.kv_bytes_per_position(DType::BF16), 128 * 1024);

    let biased = json!({ "attention_bias": true, "mlp_bias": true });
    let biased = |model_type| parse(json_config(model_type, biased.clone()));
    for (model_type, qkv, o, mlp) in [
        ("llama", true, true, true),
        ("mistral", false, false, false),
        ("mixtral", false, false, false),
        ("qwen2", true, false, false),
        ("qwen3", true, true, false),
        ("qwen3_moe", true, true, false),
    ] {
        let found = biased(model_type);
        assert_eq!(
            (found.qkv_bias, found.o_bias, found.mlp_bias),
            (qkv, o, mlp),
            "{model_type}"
        );
    }

    let stock = stock::llama_config(&config).unwrap();
    assert_eq!(
        (stock.rope_theta, stock.rope_scaling.unwrap().factor),
        (500000.0, 8.0)
    );

    // As transformers 5 writes the same thing.
    let mut five = llama_3_1_8b();
    let object = five.as_object_mut().unwrap();
    let mut rope = object.remove("rope_scaling").unwrap();
    rope["rope_theta"] = object.remove("rope_theta").unwrap();
    object.insert("rope_parameters".to_string(), rope);
    object.remove("torch_dtype");
    object.insert("dtype".to_string(), json!("bfloat16"));
    object.insert("head_dim".to_string(), json!(128));
    assert_eq!(parse(five), config);

    // Llama 1 had neither grouped heads nor a rope_theta.
    let mut one = json_config("llama", json!({ "rope_scaling": null }));
    one.as_object_mut().unwrap().remove("num_key_value_heads");
    one.as_object_mut().unwrap().remove("rope_theta");
    let one = parse(one);
    assert_eq!((one.num_key_value_heads, one.rope.theta), (4, 10000.0));
    assert_eq!(one.eos_token_ids, [2].into());
}

#[test]
fn qwen2() {
    let published = json!({
        "architectures": ["Qwen2ForCausalLM"], "bos_token_id": 151643, "eos_token_id": 151645,
        "hidden_act": "silu", "hidden_size": 3584, "intermediate_size": 18944,
        "max_position_embeddings": 32768, "max_window_layers": 28, "model_type": "qwen2",
        "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 131072,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_sliding_window": false,
        "vocab_size": 152064
    });
    let config = parse(published.clone());
    assert_eq!(
        (config.architecture, config.head_dim),
        (Architecture::Qwen2, 128)
    );
    assert!(config.qkv_bias && !config.o_bias && !config.mlp_bias);
    assert_eq!(config.sliding_windows, [None; 28]);
    assert_eq!(config.rope.scaling, RopeScaling::Default);
    assert_eq!(stock::qwen2_config(&config).unwrap().rope_theta, 1e6);

    // The long-context recipe of its model card.
    let mut long = published;
    long["rope_scaling"] =
        json!({ "factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn" });
    match parse(long).rope.scaling {
        RopeScaling::Yarn {
            factor,
            attention_factor,
            beta_fast,
            truncate: true,
            ..
        } => {
            assert_eq!((factor, beta_fast), (4.0, 32.0));
            assert!((attention_factor - 1.138629436).abs() < 1e-9);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn qwen3() {
    let config = parse(json!({
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "bos_token_id": 151643,
        "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
        "intermediate_size": 12288, "max_position_embeddings": 40960, "max_window_layers": 36,
        "model_type": "qwen3", "num_attention_heads": 32, "num_hidden_layers": 36,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": null,
        "rope_theta": 1000000, "sliding_window": null, "tie_word_embeddings": false,
        "torch_dtype": "bfloat16", "use_sliding_window": false, "vocab_size": 151936
    }));
    assert!(config.qk_norm && !config.qkv_bias && config.moe.is_none());
    assert_eq!(
        (config.head_dim, config.num_hidden_layers, config.rope.theta),
        (128, 36, 1e6)
    );
    assert_eq!(stock::qwen3_config(&config).unwrap().head_dim, 128);
    assert!(stock::llama_config(&config).is_err());
}

#[test]
fn qwen3_moe() {
    let published = json!({
        "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": false, "bos_token_id": 151643,
        "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 40960,
        "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe",
        "moe_intermediate_size": 768, "norm_topk_prob": true, "num_attention_heads": 32,
        "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
        "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_scaling": null,
        "rope_theta": 1000000.0, "sliding_window": null, "tie_word_embeddings": false,
        "use_sliding_window": false, "vocab_size": 151936
    });
    let config = parse(published.clone());
    let moe = config.moe.as_ref().unwrap();
    assert_eq!(
        (
            moe.num_experts,
            moe.num_experts_per_tok,
            moe.intermediate_size
        ),
        (128, 8, 768)
    );
    assert!(moe.norm_topk_prob && (0..48).all(|i| config.is_sparse(i)) && !config.is_sparse(48));
    assert_eq!((config.head_dim, config.hidden_size), (128, 2048));
    assert_eq!(
        stock::qwen3_moe_config(&config)
            .unwrap()
            .decoder_sparse_step,
        1
    );

    let mut mixed = published;
    mixed["decoder_sparse_step"] = json!(3);
    let config = parse(mixed.clone());
    assert_eq!(
        stock::qwen3_moe_config(&config)
            .unwrap()
            .decoder_sparse_step,
        3
    );
    mixed["mlp_only_layers"] = json!([5, 700]);
    let config = parse(mixed);
    let sparse: Vec<_> = (0..10).filter(|&i| config.is_sparse(i)).collect();
    assert_eq!(sparse, [2, 8]);
    assert!(stock::qwen3_moe_config(&config).is_err());
}

#[test]
fn mixtral_and_mistral() {
    let config = parse(json!({
        "architectures": ["MixtralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32,
        "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "num_local_experts": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02, "sliding_window": null, "tie_word_embeddings": false,
        "torch_dtype": "bfloat16", "vocab_size": 32000
    }));
    let moe = config.moe.as_ref().unwrap();
    assert_eq!(
        (
            moe.num_experts,
            moe.num_experts_per_tok,
            moe.intermediate_size
        ),
        (8, 2, 14336)
    );
    assert!(moe.norm_topk_prob && config.is_sparse(31));
    assert_eq!(config.sliding_windows, [None; 32]);

    let windowed = parse(json_config("mistral", json!({ "sliding_window": 4096 })));
    assert_eq!(windowed.sliding_windows, [Some(4096); 3]);
    assert!(stock::llama_config(&windowed).is_err());
    let mut unsaid = json_config("mistral", json!({}));
    unsaid.as_object_mut().unwrap().remove("sliding_window");
    assert_eq!(parse(unsaid).sliding_windows, [Some(4096); 3]);
    for model_type in ["qwen2", "qwen3", "qwen3_moe"] {
        let changes = json!({ "use_sliding_window": true, "max_window_layers": 0 });
        let mut unsaid = json_config(model_type, changes);
        unsaid.as_object_mut().unwrap().remove("sliding_window");
        assert_eq!(parse(unsaid).sliding_windows, [Some(4096); 3]);
    }

    let first = |first: u32| {
        let changes =
            json!({ "use_sliding_window": true, "sliding_window": 8, "max_window_layers": first });
        parse(json_config("qwen2", changes)).sliding_windows
    };
    assert_eq!(first(0), [Some(8); 3]);
    assert_eq!(first(2), [None, None, Some(8)]);
    assert_eq!(first(3), [None; 3]);

    let typed = json!({
        "use_sliding_window": true, "sliding_window": 8,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    });
    assert_eq!(
        parse(json_config("qwen3", typed)).sliding_windows,
        [None, Some(8), None]
    );
}

#[test]
fn text_config() {
    // Keys equal to the class defaults are left out in such files.
    let config = parse(json!({
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
        "vision_config": { "model_type": "pixtral", "hidden_size": 1024 },
        "text_config": {
            "head_dim": 128, "hidden_size": 5120, "intermediate_size": 14336,
            "max_position_embeddings": 1024000, "model_type": "mistral", "num_hidden_layers": 40,
            "rms_norm_eps": 1e-05, "rope_theta": 1000000000.0, "sliding_window": null,
            "vocab_size": 131072
        },
        "tie_word_embeddings": false, "eos_token_id": 2, "torch_dtype": "float16"
    }));
    assert_eq!(config.architecture, Architecture::Mistral);
    assert_eq!(
        (config.num_attention_heads, config.num_key_value_heads),
        (32, 8)
    );
    assert_eq!((config.head_dim, config.hidden_size), (128, 5120));
    assert_eq!(config.tie_word_embeddings, Some(false));
    assert_eq!(config.eos_token_ids, [2].into());
    assert_eq!(config.dtype, Some(DType::F16));
}

#[test]
fn generation_config() {
    let mut config = parse(json_config("llama", json!({ "eos_token_id": 2 })));
    let file = json!({
        "eos_token_id": [2, 7], "do_sample": true, "temperature": 0.6, "top_p": 0.9, "top_k": 20,
        "repetition_penalty": 1.05
    });
    config.add_generation_config(&file).unwrap();
    assert_eq!(config.eos_token_ids, [2, 7].into());
    assert!(
        config
            .add_generation_config(&json!({ "eos_token_id": "</s>" }))
            .is_err()
    );

    let mut settings = GenerationConfig::new(&config);
    assert_eq!(
        (settings.temperature, settings.eos_token_ids.len()),
        (None, 2)
    );
    settings.apply(&file).unwrap();
    assert_eq!(
        (settings.temperature, settings.top_p),
        (Some(0.6), Some(0.9))
    );
    assert_eq!((settings.top_k, settings.repeat_penalty), (Some(20), 1.05));
    let mut greedy = GenerationConfig::default();
    greedy
        .apply(&json!({ "do_sample": false, "temperature": 0.6, "eos_token_id": 3 }))
        .unwrap();
    assert_eq!((greedy.temperature, greedy.top_k), (None, None));
    assert_eq!(greedy.eos_token_ids, [3].into());
}

/// The error of a llama config with `changes`.
fn refused(model_type: &str, changes: Value) -> Error {
    ModelConfig::from_json(&json_config(model_type, changes)).unwrap_err()
}

#[test]
fn what_is_not_served_is_refused_with_what_is() {
    let check = |error: Error, texts: &[&str]| {
        for text in texts {
            assert!(
                error.to_string().contains(text),
                "`{text}` is not in: {error}"
            );
        }
    };
    let error = refused("llama", json!({ "architectures": ["GPT2LMHeadModel"] }));
    assert!(matches!(error, Error::UnsupportedArchitecture { .. }));
    check(
        error,
        &[
            "`GPT2LMHeadModel`",
            "LlamaForCausalLM",
            "MixtralForCausalLM",
        ],
    );
    check(
        refused("gemma", json!({})),
        &["`gemma` (model_type", "qwen3_moe"],
    );
    check(
        ModelConfig::from_json(&json!({})).unwrap_err(),
        &["`nothing` (model_type"],
    );
    check(
        ModelConfig::from_json(&json!([1])).unwrap_err(),
        &["`nothing`"],
    );
    let nested = json!({ "text_config": { "model_type": "qwen2_vl_text" } });
    check(
        refused("qwen2_vl", nested),
        &["`qwen2_vl_text` (text_config.model_type", "mistral"],
    );

    let error = refused("llama", json!({ "hidden_act": "gelu" }));
    assert!(matches!(error, Error::Unsupported { .. }));
    check(error, &["`hidden_act` is \"gelu\"", "supported: silu"]);

    let rope = |rope: Value| refused("llama", json!({ "rope_scaling": rope }));
    let error = rope(json!({ "rope_type": "longrope", "factor": 2.0 }));
    check(
        error,
        &[
            "`rope_scaling.rope_type` is \"longrope\"",
            "default, linear, llama3, yarn",
        ],
    );
    let error = rope(json!({ "type": "dynamic", "factor": 2.0 }));
    check(error, &["`rope_scaling.type` is \"dynamic\""]);
    check(
        rope(json!({ "rope_type": "llama3", "factor": 8.0 })),
        &["low_freq_factor` is missing"],
    );
    check(
        rope(json!({ "rope_type": "linear", "factor": -1 })),
        &["`rope_scaling.factor` is -1"],
    );
    check(rope(json!("linear")), &["expected an object or null"]);
    check(
        rope(json!({ "full_attention": { "rope_type": "default" } })),
        &["for all layers"],
    );
    let partial = json!({ "rope_parameters": { "partial_rotary_factor": 0.5 } });
    check(
        refused("llama", partial),
        &["`rope_parameters.partial_rotary_factor` is 0.5"],
    );
    for scaling in [json!(null), json!({ "rope_type": "linear", "factor": 2.0 })] {
        let partial = json!({ "partial_rotary_factor": 0.5, "rope_scaling": scaling });
        check(
            refused("llama", partial),
            &["`partial_rotary_factor` is 0.5"],
        );
    }

    check(
        refused("llama", json!({ "hidden_size": null })),
        &["`hidden_size` is missing"],
    );
    for bad in [
        json!(0),
        json!(-4),
        json!(2.5),
        json!("24"),
        json!(1u64 << 60),
    ] {
        let error = refused("llama", json!({ "hidden_size": bad }));
        assert!(matches!(error, Error::InvalidValue { .. }), "{error}");
        check(error, &["`hidden_size` is ", "a positive integer"]);
    }
    check(
        refused("llama", json!({ "num_hidden_layers": 1 << 30 })),
        &["at most 4096"],
    );
    check(
        refused("llama", json!({ "num_key_value_heads": 3 })),
        &["divisor of num_attention"],
    );
    check(
        refused("llama", json!({ "hidden_size": 25 })),
        &["multiple of num_attention_heads"],
    );
    check(
        refused("llama", json!({ "head_dim": 7 })),
        &["`head_dim` is 7", "even"],
    );
    check(
        refused("llama", json!({ "rms_norm_eps": "tiny" })),
        &["`rms_norm_eps` is \"tiny\""],
    );
    check(
        refused("llama", json!({ "rms_norm_eps": null })),
        &["`rms_norm_eps` is missing"],
    );
    check(
        refused("llama", json!({ "attention_bias": 1 })),
        &["`attention_bias` is 1", "true or"],
    );
    check(
        refused("llama", json!({ "eos_token_id": [1, "x"] })),
        &["list of token ids"],
    );
    check(
        refused("qwen3", json!({ "head_dim": null })),
        &["`head_dim` is missing"],
    );
    check(
        refused("mixtral", json!({ "num_experts_per_tok": 6 })),
        &["at most num_local_experts"],
    );
    check(
        refused("qwen3_moe", json!({ "num_experts": null })),
        &["`num_experts` is missing"],
    );
    check(
        refused("qwen3_moe", json!({ "mlp_only_layers": [-1] })),
        &["list of layer indices"],
    );
    let types = json!({
        "use_sliding_window": true, "sliding_window": 8,
        "layer_types": ["full_attention", "linear_attention", "full_attention"],
    });
    check(
        refused("qwen3", types),
        &["layer_types", "linear_attention"],
    );
}

#[test]
fn stock_configs_refuse_what_stock_models_would_get_wrong() {
    let llama = |changes| stock::llama_config(&parse(json_config("llama", changes)));
    llama(json!({})).unwrap();
    for changes in [
        json!({ "head_dim": 10 }),
        json!({ "attention_bias": true }),
        json!({ "mlp_bias": true }),
        json!({ "rope_scaling": { "rope_type": "linear", "factor": 2.0 } }),
    ] {
        let error = llama(changes.clone()).unwrap_err();
        assert!(
            matches!(error, Error::NotStock { model: "llama", .. }),
            "{changes}"
        );
    }
    let windows =
        json!({ "use_sliding_window": true, "sliding_window": 8, "max_window_layers": 0 });
    assert!(stock::qwen2_config(&parse(json_config("qwen2", windows))).is_err());
    let yarn = json!({ "rope_scaling": { "rope_type": "yarn", "factor": 2.0 } });
    assert!(stock::qwen3_config(&parse(json_config("qwen3", yarn))).is_err());
}
