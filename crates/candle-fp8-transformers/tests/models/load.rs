//! Names, ties and prefixes: what is read from where, and what comes back out.

use crate::common::{
    Dense, MODEL_TYPES, build, config, difference, ids, prompt, tensors, var_builder,
};
use candle_core::{DType, Device, Tensor};
use candle_fp8_transformers::{CausalLm, Error};
use serde_json::json;

fn logits(model: &CausalLm) -> Tensor {
    let mut cache = model.new_cache(1, 8).unwrap();
    model
        .forward_all(&ids(&[prompt(1, 8)]), &mut cache)
        .unwrap()
}

#[test]
fn the_state_holds_every_tensor_under_its_name() {
    for model_type in MODEL_TYPES {
        let config = config(model_type, json!({}));
        let mut tensors = tensors(&config, "model");
        let scale = Tensor::new(&[0.02f32], &Device::Cpu).unwrap();
        for name in ["k_scale", "v_scale"] {
            tensors.insert(format!("model.layers.0.self_attn.{name}"), scale.clone());
        }
        let model = build(&config, &tensors, DType::F32);
        let state = model.state();
        let mut expected: Vec<_> = tensors.keys().map(String::as_str).collect();
        expected.sort_unstable();
        assert_eq!(state.names().collect::<Vec<_>>(), expected, "{model_type}");
        for (name, tensor) in &tensors {
            assert_eq!(
                difference(&state.get(name).unwrap().tensor().unwrap(), tensor),
                0.0,
                "{name}"
            );
        }
        let bytes: usize = tensors.values().map(|tensor| 4 * tensor.elem_count()).sum();
        assert_eq!(model.weight_bytes(), bytes);

        // Linears are those with a `…_proj`, a router or a head.
        let linears: Vec<_> = model.linears().map(|(name, _)| name).collect();
        let is_linear = |name: &&&str| {
            name.ends_with("_proj.weight")
                || name.ends_with("gate.weight")
                || **name == "lm_head.weight"
        };
        assert_eq!(linears.len(), expected.iter().filter(is_linear).count());
        assert_eq!(linears[0], "model.layers.0.self_attn.q_proj");
        assert_eq!(linears.last().unwrap(), "lm_head");
    }
}

#[test]
fn the_output_projection_is_tied_as_the_config_says() {
    let tied = json!({ "tie_word_embeddings": true });
    let unsaid = json!({ "tie_word_embeddings": null });
    let own = tensors(&config("llama", json!({})), "model");
    let mut without = own.clone();
    without.remove("lm_head.weight");
    let mut equal = own.clone();
    equal.insert(
        "lm_head.weight".to_string(),
        own["model.embed_tokens.weight"].clone(),
    );

    let has_head = |changes, tensors| {
        let model = build(&config("llama", changes), tensors, DType::F32);
        let named = model.linears().any(|(name, _)| name == "lm_head");
        assert_eq!(model.state().get("lm_head.weight").is_some(), named);
        (named, logits(&model))
    };
    let (named, by_embedding) = has_head(tied.clone(), &without);
    assert!(!named);
    let (named, by_head) = has_head(json!({}), &own);
    assert!(named && difference(&by_embedding, &by_head) > 0.1);
    // The config is silent: the tensor's presence decides.
    assert_eq!(difference(&has_head(unsaid.clone(), &own).1, &by_head), 0.0);
    assert_eq!(
        difference(&has_head(unsaid, &without).1, &by_embedding),
        0.0
    );
    // The config says tied: an equal copy is not kept, a different matrix is used.
    let (named, values) = has_head(tied.clone(), &equal);
    assert!(!named && difference(&values, &by_embedding) == 0.0);
    let (named, values) = has_head(tied, &own);
    assert!(named && difference(&values, &by_head) == 0.0);
    // The config says untied, and there is none.
    let vb = var_builder(&without, DType::F32);
    let error = CausalLm::load(&config("llama", json!({})), &Dense, vb).unwrap_err();
    assert!(error.to_string().contains("lm_head.weight"), "{error}");
}

#[test]
fn multimodal_prefixes_are_found() {
    let config = config("qwen3", json!({}));
    let reference = logits(&build(&config, &tensors(&config, "model"), DType::F32));
    for (prefix, head) in [
        ("language_model.model", "language_model.lm_head"),
        ("model.language_model", "lm_head"),
        ("model.language_model.model", "model.language_model.lm_head"),
    ] {
        let mut tensors = tensors(&config, prefix);
        let weight = tensors.remove("lm_head.weight").unwrap();
        tensors.insert(format!("{head}.weight"), weight);
        let model = build(&config, &tensors, DType::F32);
        assert_eq!(difference(&logits(&model), &reference), 0.0, "{prefix}");
        let state = model.state();
        assert_eq!(state.names().count(), tensors.len());
        assert!(
            state.names().all(|name| tensors.contains_key(name)),
            "{prefix}"
        );
    }
}

#[test]
fn missing_and_misshapen_tensors_are_named() {
    for model_type in MODEL_TYPES {
        let config = config(model_type, json!({}));
        let all = tensors(&config, "model");
        for name in all.keys() {
            let mut missing = all.clone();
            missing.remove(name);
            let vb = var_builder(&missing, DType::F32);
            let error = CausalLm::load(&config, &Dense, vb).unwrap_err().to_string();
            assert!(error.contains(name), "{name}: {error}");

            let mut misshapen = all.clone();
            misshapen.insert(
                name.clone(),
                Tensor::zeros((3, 5, 7), DType::F32, &Device::Cpu).unwrap(),
            );
            let vb = var_builder(&misshapen, DType::F32);
            let error = CausalLm::load(&config, &Dense, vb).unwrap_err().to_string();
            assert!(error.contains(name), "{name}: {error}");
        }
    }
}

#[test]
fn incomplete_kv_scales_are_refused() {
    let config = config("llama", json!({}));
    let scale = |shape: &[usize]| Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap();
    let load = |scales: &[(&str, &[usize])]| {
        let mut all = tensors(&config, "model");
        for (name, shape) in scales {
            all.insert(format!("model.layers.1.self_attn.{name}"), scale(shape));
        }
        CausalLm::load(&config, &Dense, var_builder(&all, DType::F32))
    };
    for shape in [&[][..], &[1], &[1, 1], &[2], &[2, 1, 1]] {
        load(&[("k_scale", shape), ("v_scale", shape)]).unwrap();
    }
    let error = load(&[("k_scale", &[1])]).unwrap_err();
    assert!(matches!(error, Error::Mismatch { .. }));
    assert!(
        error.to_string().contains("both k_scale and v_scale"),
        "{error}"
    );
    let error = load(&[("k_scale", &[3]), ("v_scale", &[1])])
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("model.layers.1.self_attn.k_scale") && error.contains("[3]"),
        "{error}"
    );
}
