//! Logits of every architecture against the plain f64 model, and ways of computing them against
//! each other.

use crate::common::{MODEL_TYPES, Numbers, difference, ids, model, naive, prompt};
use candle_core::{DType, Device, IndexOp, Tensor};
use candle_fp8_transformers::{CausalLm, KvCache};
use serde_json::{Value, json};

/// Sums of at most 40 products of numbers near 1 in f32 against f64, through three layers: 1e-6
/// relative a sum, on logits near 5.
const F32_BOUND: f32 = 5e-5;

fn all_logits(model: &CausalLm, ids: &Tensor) -> Tensor {
    let (batch, len) = ids.dims2().unwrap();
    let mut cache = model.new_cache(batch, len).unwrap();
    model.forward_all(ids, &mut cache).unwrap()
}

fn naive_logits(model: &CausalLm, tensors: &crate::common::Tensors, prompt: &[u32]) -> Tensor {
    let logits = naive::logits(model.config(), tensors, prompt);
    let shape = (1, prompt.len(), logits[0].len());
    let logits = Tensor::from_vec(logits.concat(), shape, &Device::Cpu).unwrap();
    logits.to_dtype(DType::F32).unwrap()
}

fn check(model_type: &str, changes: Value) {
    let (model, tensors) = model(model_type, changes.clone(), DType::F32);
    let prompt = prompt(3, 13);
    let expected = naive_logits(&model, &tensors, &prompt);
    let worst = difference(&all_logits(&model, &ids(&[prompt])), &expected);
    assert!(worst < F32_BOUND, "{model_type} {changes}: {worst}");
    let largest = expected
        .abs()
        .unwrap()
        .max_all()
        .unwrap()
        .to_scalar::<f32>()
        .unwrap();
    assert!(
        largest > 1.0,
        "{model_type}: logits too small to tell anything: {largest}"
    );
}

#[test]
fn every_architecture_computes_what_the_plain_model_does() {
    for model_type in MODEL_TYPES {
        check(model_type, json!({}));
    }
}

#[test]
fn variants_of_the_configs_do_too() {
    check("llama", json!({ "tie_word_embeddings": true }));
    check("llama", json!({ "attention_bias": true, "mlp_bias": true }));
    check("llama", json!({ "num_key_value_heads": 4, "head_dim": 14 }));
    check(
        "llama",
        json!({ "num_key_value_heads": 1, "rope_theta": 500000.0 }),
    );
    check("mistral", json!({ "sliding_window": 5 }));
    check(
        "mixtral",
        json!({ "sliding_window": 1, "num_experts_per_tok": 5 }),
    );
    let windows =
        json!({ "use_sliding_window": true, "sliding_window": 4, "max_window_layers": 1 });
    check("qwen2", windows);
    check("qwen3", json!({ "attention_bias": true }));
    check(
        "qwen3_moe",
        json!({ "norm_topk_prob": false, "decoder_sparse_step": 2, "mlp_only_layers": [] }),
    );
    check(
        "qwen3_moe",
        json!({ "num_experts_per_tok": 1, "mlp_only_layers": [] }),
    );
}

#[test]
fn token_by_token_equals_all_at_once() {
    for model_type in MODEL_TYPES {
        let changes = match model_type {
            "mistral" => json!({ "sliding_window": 4 }),
            _ => json!({}),
        };
        let (model, _) = model(model_type, changes, DType::F32);
        let prompt = prompt(5, 11);
        let expected = all_logits(&model, &ids(std::slice::from_ref(&prompt)));
        // Pieces of 1, 3, 1, 1, 5 tokens: also several tokens after a filled cache.
        let mut cache = model.new_cache(1, 16).unwrap();
        let mut start = 0;
        for len in [1, 3, 1, 1, 5] {
            let piece = ids(&[prompt[start..start + len].to_vec()]);
            let logits = model.forward(&piece, &mut cache).unwrap();
            start += len;
            let worst = difference(&logits, &expected.i((.., start - 1)).unwrap());
            assert!(worst < F32_BOUND, "{model_type} at {start}: {worst}");
            assert_eq!(cache.len(), start);
        }
    }
}

#[test]
fn long_prompts_are_scored_in_blocks() {
    // 300 queries are two blocks of 256; the window makes the second start at a key above 0.
    for window in [Value::Null, json!(40)] {
        let (model, _) = model("mistral", json!({ "sliding_window": window }), DType::F32);
        let prompt = prompt(9, 300);
        let at_once = all_logits(&model, &ids(std::slice::from_ref(&prompt)));
        let mut cache = model.new_cache(1, 300).unwrap();
        model
            .forward(&ids(&[prompt[..299].to_vec()]), &mut cache)
            .unwrap();
        let last = model
            .forward(&ids(&[prompt[299..].to_vec()]), &mut cache)
            .unwrap();
        assert!(difference(&last, &at_once.i((.., 299)).unwrap()) < F32_BOUND);
        let short = all_logits(&model, &ids(&[prompt[..20].to_vec()]));
        assert!(difference(&short, &at_once.i((.., ..20)).unwrap()) < F32_BOUND);
    }
}

#[test]
fn a_batch_equals_its_sequences() {
    for model_type in MODEL_TYPES {
        let (model, _) = model(model_type, json!({}), DType::F32);
        let prompts = [prompt(1, 6), prompt(2, 6), prompt(3, 6)];
        let mut cache = model.new_cache(3, 7).unwrap();
        let first = model.forward_all(&ids(&prompts), &mut cache).unwrap();
        let next = vec![vec![4], vec![5], vec![6]];
        let second = model.forward(&ids(&next), &mut cache).unwrap();
        for (row, prompt) in prompts.iter().enumerate() {
            let mut cache = model.new_cache(1, 7).unwrap();
            let prompt = ids(std::slice::from_ref(prompt));
            let alone = model.forward_all(&prompt, &mut cache).unwrap();
            let batched = first.i(row..row + 1).unwrap();
            assert!(difference(&batched, &alone) < F32_BOUND, "{model_type}");
            let alone = model
                .forward(&ids(&[next[row].clone()]), &mut cache)
                .unwrap();
            let batched = second.i(row..row + 1).unwrap();
            assert!(difference(&batched, &alone) < F32_BOUND, "{model_type}");
        }
    }
}

#[test]
fn half_precision_stays_near_f32() {
    // One rounding is 2^-9 (BF16) or 2^-12 (F16) relative; some twenty of them lie between a token
    // and its logits, which reach 8. A wrong product would be off by several units.
    for (dtype, bound) in [(DType::BF16, 0.5), (DType::F16, 0.06)] {
        for model_type in ["llama", "qwen2", "qwen3"] {
            let (reference, tensors) = model(model_type, json!({}), DType::F32);
            let half = crate::common::build(reference.config(), &tensors, dtype);
            let prompt = ids(&[prompt(3, 13)]);
            let logits = all_logits(&half, &prompt);
            assert_eq!(logits.dtype(), DType::F32);
            let worst = difference(&logits, &all_logits(&reference, &prompt));
            assert!(worst < bound, "{model_type} {dtype:?}: {worst}");
            assert!(worst > 0.0, "{model_type} {dtype:?} was computed in F32");
        }
        // A router's choice can flip on rounding, so experts are compared where all are chosen.
        for (model_type, all) in [("qwen3_moe", 6), ("mixtral", 5)] {
            let (reference, tensors) = model(
                model_type,
                json!({ "num_experts_per_tok": all }),
                DType::F32,
            );
            let half = crate::common::build(reference.config(), &tensors, dtype);
            let prompt = ids(&[prompt(3, 13)]);
            let worst = difference(
                &all_logits(&half, &prompt),
                &all_logits(&reference, &prompt),
            );
            assert!(worst < bound, "{model_type} {dtype:?}: {worst}");
        }
    }
}

#[test]
fn keys_and_values_pass_through_e4m3_where_scales_exist() {
    let per_head = Tensor::new(&[[[0.011f32]], [[0.004]]], &Device::Cpu).unwrap();
    let one = |value: f32| Tensor::new(&[value], &Device::Cpu).unwrap();
    for (k_scale, v_scale) in [(one(0.01), one(0.017)), (per_head.clone(), per_head)] {
        let (plain, mut tensors) = model("llama", json!({}), DType::F32);
        for i in 0..3 {
            tensors.insert(
                format!("model.layers.{i}.self_attn.k_scale"),
                k_scale.clone(),
            );
            tensors.insert(
                format!("model.layers.{i}.self_attn.v_scale"),
                v_scale.clone(),
            );
        }
        let model = crate::common::build(plain.config(), &tensors, DType::F32);
        let prompt = prompt(3, 9);
        let expected = naive_logits(&model, &tensors, &prompt);
        let ids = ids(std::slice::from_ref(&prompt));
        let worst = difference(&all_logits(&model, &ids), &expected);
        let effect = difference(&all_logits(&plain, &ids), &expected);
        assert!(
            worst < F32_BOUND && effect > 100.0 * F32_BOUND,
            "{worst} against {effect}"
        );
    }
}

#[test]
fn experts_that_no_token_chose_are_not_read() {
    let changes = json!({ "num_hidden_layers": 1, "mlp_only_layers": [] });
    let (healthy, tensors) = model("qwen3_moe", changes, DType::F32);
    for (tokens, counts) in [(1, 2..=2), (2, 2..=4)] {
        let ids = ids(&[prompt(3, tokens)]);
        let spoilt = (0..6).filter(|&expert| {
            let factors: Vec<f32> = (0..6)
                .map(|e| if e == expert { f32::NAN } else { 1.0 })
                .collect();
            let factors = Tensor::from_vec(factors, (6, 1, 1), &Device::Cpu).unwrap();
            let mut tensors = tensors.clone();
            for name in ["gate_up_proj", "down_proj"] {
                let name = format!("model.layers.0.mlp.experts.{name}");
                let stack = tensors[&name].broadcast_mul(&factors).unwrap();
                tensors.insert(name, stack);
            }
            let model = crate::common::build(healthy.config(), &tensors, DType::F32);
            let sum = all_logits(&model, &ids)
                .sum_all()
                .unwrap()
                .to_scalar::<f32>()
                .unwrap();
            sum.is_nan()
        });
        let spoilt = spoilt.count();
        assert!(
            counts.contains(&spoilt),
            "{spoilt} experts were read for {tokens} tokens"
        );
    }
}

#[test]
fn a_full_cache_is_an_error_and_changes_nothing() {
    let (model, _) = model("llama", json!({}), DType::F32);
    let mut cache = model.new_cache(1, 8).unwrap();
    model.forward(&ids(&[prompt(1, 6)]), &mut cache).unwrap();
    let error = model
        .forward(&ids(&[prompt(2, 3)]), &mut cache)
        .unwrap_err();
    assert!(
        matches!(
            error,
            candle_fp8_transformers::Error::CacheFull {
                used: 6,
                new: 3,
                max_seq: 8
            }
        ),
        "{error}"
    );
    assert!(
        error
            .to_string()
            .contains("holds 8 positions and 6 are used: 3 more do not fit")
    );
    // The same cache goes on where it was …
    let (two, mut fresh) = (prompt(2, 2), model.new_cache(1, 8).unwrap());
    let after_error = model
        .forward(&ids(std::slice::from_ref(&two)), &mut cache)
        .unwrap();
    let all = ids(&[[prompt(1, 6), two].concat()]);
    let expected = model.forward(&all, &mut fresh).unwrap();
    assert!(difference(&after_error, &expected) < F32_BOUND);
    // … and can be emptied, or cut back to a prefix.
    cache.truncate(6);
    let again = model.forward(&ids(&[prompt(2, 2)]), &mut cache).unwrap();
    assert!(difference(&again, &expected) < F32_BOUND);
    cache.reset();
    assert!(cache.is_empty());
    model.forward(&ids(&[prompt(4, 8)]), &mut cache).unwrap();
}

#[test]
fn ids_and_caches_of_something_else_are_refused() {
    let (model, _) = model("llama", json!({}), DType::F32);
    let device = Device::Cpu;
    let two = ids(&[prompt(1, 4), prompt(2, 4)]);
    let cases = [
        (
            ids(&[prompt(1, 4)]),
            model.new_cache(2, 8).unwrap(),
            "shape [B, Hkv, max_seq, D]",
        ),
        (
            two.clone(),
            KvCache::new(model.config(), 2, 8, DType::BF16, &device).unwrap(),
            "dtype",
        ),
        (
            two.i(0).unwrap(),
            model.new_cache(1, 8).unwrap(),
            "shape of the token ids",
        ),
        (
            two.i((.., ..0)).unwrap(),
            model.new_cache(2, 8).unwrap(),
            "at least 1",
        ),
        (
            Tensor::new(&[[61u32]], &device).unwrap(),
            model.new_cache(1, 8).unwrap(),
            "index",
        ),
    ];
    for (ids, mut cache, text) in cases {
        let error = model.forward(&ids, &mut cache).unwrap_err().to_string();
        assert!(error.contains(text), "{error}");
        assert_eq!(cache.len(), 0);
    }
    let other = crate::common::config("llama", json!({ "num_hidden_layers": 2 }));
    let mut cache = KvCache::new(&other, 2, 8, DType::F32, &device).unwrap();
    assert!(
        model
            .forward(&two, &mut cache)
            .unwrap_err()
            .to_string()
            .contains("layers")
    );
    for (batch, max_seq) in [(0, 8), (1, 0), (usize::MAX / 4, usize::MAX / 4)] {
        assert!(model.new_cache(batch, max_seq).is_err());
    }
}

#[test]
fn a_cache_that_no_memory_holds_is_an_error() {
    let (model, _) = model("llama", json!({}), DType::F32);
    // More than there are addresses for.
    let error = model.new_cache(3, 1 << 48).unwrap_err();
    assert!(
        matches!(error, candle_fp8_transformers::Error::OutOfMemory { .. }),
        "{error}"
    );
    let text = error.to_string();
    assert!(
        text.starts_with("out of memory: a KV cache of 3 × 281474976710656 positions ("),
        "{text}"
    );
    assert!(
        text.contains(" GiB)") && text.contains("smaller max_seq"),
        "{text}"
    );
    // The model is none the worse for it.
    let mut cache = model.new_cache(1, 8).unwrap();
    model.forward(&ids(&[prompt(1, 6)]), &mut cache).unwrap();
}

#[test]
fn a_pass_that_fails_leaves_the_cache_as_it_was() {
    let (model, _) = model("llama", json!({}), DType::F32);
    let (first, second) = (ids(&[prompt(1, 4)]), ids(&[prompt(2, 2)]));
    let mut cache = model.new_cache(1, 8).unwrap();
    model.forward(&first, &mut cache).unwrap();
    // A token that the vocabulary does not have.
    let wrong = Tensor::new(&[[3u32, 61]], &Device::Cpu).unwrap();
    for _ in 0..2 {
        model.forward(&wrong, &mut cache).unwrap_err();
        model.forward_all(&wrong, &mut cache).unwrap_err();
        assert_eq!(cache.len(), 4);
    }
    let after = model.forward(&second, &mut cache).unwrap();
    let mut fresh = model.new_cache(1, 8).unwrap();
    model.forward(&first, &mut fresh).unwrap();
    let expected = model.forward(&second, &mut fresh).unwrap();
    assert_eq!(difference(&after, &expected), 0.0);
}

#[test]
fn the_plain_models_rounding_to_e4m3_is_right() {
    let pairs = [
        (1.0, 1.0),
        (1.06, 1.0),
        (1.07, 1.125),
        (1.0625, 1.0),
        (1.1875, 1.25),
    ];
    let edges = [
        (500.0, 448.0),
        (-0.001, -0.001953125),
        (0.0009, 0.0),
        (0.0156, 0.015625),
    ];
    for (x, expected) in pairs.into_iter().chain(edges) {
        assert_eq!(naive::e4m3(x), expected, "{x}");
    }
    let mut numbers = Numbers::new(1);
    let spread: Vec<f32> = (0..1000).map(|_| numbers.next()).collect();
    assert!(spread.iter().any(|x| *x < -0.9) && spread.iter().any(|x| *x > 0.9));
}
