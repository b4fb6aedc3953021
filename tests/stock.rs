//! Door 1: models of candle-transformers, as they are, from FP8 checkpoints. They agree with ours under `dequantize`.

// Each test binary uses its part of the shared module.
#[allow(dead_code, unreachable_pub)]
mod support;

use candle_core::{DType, Device, Tensor};
use candle_fp8_transformers::{ModelConfig, stock};
use candle_nn::VarBuilder;
use candle_transformers::models::{llama, qwen2, qwen3, qwen3_moe};
use support::{Fixture, Mode, loadable, logits, max_difference, model, rows};

/// The last position's logits of a stock model, for a prompt.
type Stock = Box<dyn FnMut(&Tensor) -> candle_core::Result<Tensor>>;

fn build(config: &ModelConfig, arch: &str, vb: VarBuilder) -> Option<Stock> {
    Some(match arch {
        "llama" => {
            let config = stock::llama_config(config).unwrap();
            let model = llama::Llama::load(vb, &config).unwrap();
            Box::new(move |ids| {
                let mut cache = llama::Cache::new(false, DType::F32, &config, &Device::Cpu)?;
                model.forward(ids, 0, &mut cache)
            })
        }
        "qwen2" => {
            let mut model =
                qwen2::ModelForCausalLM::new(&stock::qwen2_config(config).unwrap(), vb).unwrap();
            Box::new(move |ids| {
                model.clear_kv_cache();
                model.forward(ids, 0)?.squeeze(1)
            })
        }
        "qwen3" => {
            let mut model =
                qwen3::ModelForCausalLM::new(&stock::qwen3_config(config).unwrap(), vb).unwrap();
            Box::new(move |ids| {
                model.clear_kv_cache();
                model.forward(ids, 0)?.squeeze(1)
            })
        }
        "qwen3_moe" => {
            let mut model =
                qwen3_moe::ModelForCausalLM::new(&stock::qwen3_moe_config(config).unwrap(), vb)
                    .unwrap();
            Box::new(move |ids| {
                model.clear_kv_cache();
                model.forward(ids, 0)?.squeeze(1)
            })
        }
        _ => return None,
    })
}

fn compare(fixture: &Fixture) -> bool {
    let checkpoint = fixture.checkpoint();
    // The quantizer that keeps FP8: dequantizing is what door 1 does with any.
    let quantizer = fixture.quantizer(Mode::AsCheckpoint);
    let config = ModelConfig::from_json(checkpoint.config()).unwrap();
    let vb = quantizer.var_builder(DType::F32, &Device::Cpu).unwrap();
    // Stock models ask for `model.layers…`, wherever a multimodal checkpoint keeps its decoder.
    let prefix = fixture.decoder_prefix.clone();
    let vb = match prefix.strip_suffix(".model") {
        Some(outer) => vb.pp(outer),
        None => vb.rename_f(move |name| match name.strip_prefix("model.") {
            Some(rest) => format!("{prefix}.{rest}"),
            None => name.to_string(),
        }),
    };
    let Some(mut stock) = build(&config, &fixture.arch, vb) else {
        return false;
    };
    let ours = model(&checkpoint, &fixture.quantizer(Mode::Dequantized));
    let ids = fixture.reference().ids("input_ids");
    for len in [1, 2, ids.len()] {
        let prompt = Tensor::new(&ids[..len], &Device::Cpu)
            .unwrap()
            .unsqueeze(0)
            .unwrap();
        let found = rows(&stock(&prompt).unwrap());
        let expected = vec![logits(&ours, &ids[..len]).pop().unwrap()];
        let largest = expected[0]
            .iter()
            .fold(0., |max: f64, value| max.max(value.abs()));
        let error = max_difference(&found, &expected);
        // Two f32 programs over equal weights, sums in another order.
        assert!(
            error <= 1e-4 * largest,
            "{} at {len} tokens: {error} of {largest}",
            fixture.name
        );
    }
    true
}

#[test]
fn stock_models_load_dequantized_weights_from_fp8_checkpoints() {
    let mut seen = std::collections::BTreeMap::<String, usize>::new();
    for fixture in loadable() {
        // A stock model knows nothing of a quantized cache; its weights are the same.
        let compared = compare(&fixture);
        assert!(
            compared || fixture.arch == "mixtral",
            "{} was left out",
            fixture.name
        );
        *seen.entry(fixture.arch).or_default() += usize::from(compared);
    }
    for (arch, least) in [("llama", 20), ("qwen2", 2), ("qwen3", 3), ("qwen3_moe", 4)] {
        assert!(seen[arch] >= least, "{arch}: {seen:?}");
    }
}
