//! What a checkpoint holds, from its headers and scales.

use std::collections::BTreeMap;

use candle_compressed_tensors::{Checkpoint, LoadOptions, Plan, TensorInfo, Warning};
use candle_core::{DType, Device, safetensors::Load};
use candle_fp8_transformers::ModelConfig;
use compressed_tensors::QuantizationConfig;
use safetensors::Dtype;
use serde::Serialize;

/// Everything that `inspect` says; also its JSON.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Report {
    /// The folder.
    pub(crate) checkpoint: String,
    /// The model class, if it is one that is built here.
    pub(crate) architecture: Option<String>,
    /// How config.json spells the quantization; absent: none.
    pub(crate) quantization: Option<Quantization>,
    pub(crate) modules: Vec<Module>,
    pub(crate) kv_cache: Option<KvCache>,
    pub(crate) totals: Totals,
    /// Why the checkpoint is refused; empty: it is not.
    pub(crate) refused: Vec<String>,
    pub(crate) warnings: Vec<String>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Quantization {
    pub(crate) quant_method: String,
    pub(crate) format: Option<String>,
    pub(crate) ignore: Vec<String>,
}

/// The tensors under one name.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Module {
    pub(crate) module: String,
    /// `fp8`, `dequantized` (stored in FP8, loaded dense), `dense` or `refused`.
    pub(crate) kind: Kind,
    /// The config group that it matched.
    pub(crate) group: Option<String>,
    /// Strategy of the weight.
    pub(crate) weights: Option<String>,
    /// Strategy of the input.
    pub(crate) activations: Option<String>,
    /// Stored dtype of the weight.
    pub(crate) dtype: String,
    /// Shape of the weight.
    pub(crate) shape: Vec<usize>,
    /// The weight and everything beside it: scales, bias.
    pub(crate) bytes: u64,
}

impl Module {
    /// Whether the two differ in nothing but their names.
    pub(crate) fn is_like(&self, other: &Self) -> bool {
        let named_alike = Self {
            module: other.module.clone(),
            ..self.clone()
        };
        named_alike == *other
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Kind {
    Fp8,
    Dequantized,
    Dense,
    Refused,
}

/// The scales with which keys and values go through E4M3.
#[derive(Debug, Serialize)]
pub(crate) struct KvCache {
    /// The `kv_cache_scheme`, in words; absent: there are scales without one.
    pub(crate) scheme: Option<String>,
    /// Stored name → values, one or one for each head.
    pub(crate) scales: BTreeMap<String, Vec<f32>>,
}

/// Sums over all tensors.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Totals {
    /// Linears stored in FP8.
    pub(crate) fp8_modules: usize,
    /// Their weights' parameters.
    pub(crate) fp8_parameters: u64,
    /// Their weights and scales, as stored.
    pub(crate) fp8_bytes: u64,
    /// Everything else, biases of FP8 linears and KV cache scales included.
    pub(crate) dense_parameters: u64,
    pub(crate) dense_bytes: u64,
    /// All tensors, as stored.
    pub(crate) bytes: u64,
    /// All parameters at two bytes each: the model before quantization, or under `dequantize`. Absent for a refused
    /// checkpoint.
    pub(crate) as_bf16_bytes: Option<u64>,
    /// What a model in BF16 takes when loaded: FP8 linears in FP8 with F32 scales, merged experts and the rest in BF16.
    /// Absent for a refused checkpoint.
    pub(crate) loaded_bytes: Option<u64>,
    /// Of which merged experts: stored in FP8, dense when loaded.
    pub(crate) merged_experts_bytes: u64,
}

impl Report {
    /// A checkpoint that could not even be opened.
    pub(crate) fn unreadable(checkpoint: String, reason: String) -> Self {
        Self {
            checkpoint,
            refused: vec![reason],
            ..Self::default()
        }
    }

    /// Reads headers and scales.
    pub(crate) fn new(checkpoint: &Checkpoint, options: &LoadOptions) -> Self {
        let plan = Plan::new(checkpoint, options);
        let mut warnings: Vec<String> = plan.warnings().iter().map(Warning::to_string).collect();
        let architecture = match ModelConfig::from_json(checkpoint.config()) {
            Ok(config) => Some(config.architecture.class_name().to_string()),
            Err(error) => {
                warnings.push(format!(
                    "the checkpoint loads, but no model is built for it here: {error}"
                ));
                None
            }
        };
        // A malformed one is among the plan's problems.
        let config = QuantizationConfig::from_model_config(checkpoint.config())
            .ok()
            .flatten();
        let refused: Vec<String> = plan.problems().iter().map(ToString::to_string).collect();
        let modules = modules(checkpoint, &plan, config.as_ref(), &refused);
        Self {
            checkpoint: checkpoint.dir().display().to_string(),
            architecture,
            quantization: config.as_ref().map(|config| Quantization {
                quant_method: config.quant_method().to_string(),
                format: config.format().map(str::to_string),
                ignore: config.ignore().to_vec(),
            }),
            kv_cache: kv_cache(checkpoint, config.as_ref()),
            totals: totals(checkpoint, &plan),
            modules,
            refused,
            warnings,
        }
    }
}

/// What a weight is stored as: the first is served, the others are refused.
const WEIGHTS: [&str; 3] = ["weight", "weight_packed", "compressed"];

/// One entry for each weight and what lies beside it, and for each tensor that has no weight.
fn modules(
    checkpoint: &Checkpoint,
    plan: &Plan,
    config: Option<&QuantizationConfig>,
    refusals: &[String],
) -> Vec<Module> {
    let mut tensors = BTreeMap::<(&str, &str), Vec<(&str, &TensorInfo)>>::new();
    for (name, info) in checkpoint.tensors() {
        let (module, kind) = name.rsplit_once('.').unwrap_or(("", name));
        let has = |kind| checkpoint.info(&join(module, kind)).is_some();
        // Scales of a KV cache, say, stand for themselves.
        let alone = match WEIGHTS.into_iter().any(has) {
            true => "",
            false => kind,
        };
        let row = tensors.entry((module, alone)).or_default();
        row.push((kind, info));
    }
    let describe = |((module, alone), tensors): ((&str, &str), Vec<(&str, &TensorInfo)>)| {
        let weight = tensors.iter().find(|(kind, _)| WEIGHTS.contains(kind));
        let (first, info) = *weight.or(tensors.first())?;
        let fp8 = plan.modules().get(module);
        let group = config
            .and_then(|config| config.scheme(module, "Linear"))
            .map(|scheme| scheme.group.clone());
        let refused = info.dtype == Dtype::F8_E4M3
            || tensors.iter().any(|(kind, _)| {
                let name = join(module, kind);
                refusals.iter().any(|text| mentions(text, &name))
            })
            || alone.is_empty() && refusals.iter().any(|text| mentions(text, module));
        let kind = match fp8 {
            Some(fp8) if fp8.dequantized || is_merged(module, plan) => Kind::Dequantized,
            Some(_) => Kind::Fp8,
            None if refused => Kind::Refused,
            None => Kind::Dense,
        };
        Some(Module {
            module: match first {
                "weight" => module.to_string(),
                _ => join(module, first),
            },
            kind,
            group: fp8.map(|fp8| fp8.scheme.group.clone()).or(match kind {
                Kind::Refused => group,
                _ => None,
            }),
            weights: fp8.map(|fp8| fp8.scheme.weight.to_string()),
            activations: fp8.map(|fp8| fp8.scheme.activations.to_string()),
            dtype: format!("{:?}", info.dtype),
            shape: info.shape.clone(),
            bytes: tensors.iter().map(|(_, info)| info.bytes()).sum(),
        })
    };
    tensors.into_iter().filter_map(describe).collect()
}

fn join(module: &str, tensor: &str) -> String {
    match module {
        "" => tensor.to_string(),
        _ => format!("{module}.{tensor}"),
    }
}

/// Whether `text` speaks of `name`, and not only of something whose name continues it.
fn mentions(text: &str, name: &str) -> bool {
    let in_name = |c: char| c.is_alphanumeric() || c == '_' || c == '.';
    !name.is_empty()
        && text.match_indices(name).any(|(at, _)| {
            let (before, after) = (&text[..at], &text[at + name.len()..]);
            !before.ends_with(in_name) && !after.starts_with(in_name)
        })
}

/// Whether a model takes this FP8 linear as part of a dense stack.
fn is_merged(module: &str, plan: &Plan) -> bool {
    module.contains(".experts.")
        && plan
            .warnings()
            .iter()
            .any(|warning| matches!(warning, Warning::ExpertsDequantized { .. }))
}

fn kv_cache(checkpoint: &Checkpoint, config: Option<&QuantizationConfig>) -> Option<KvCache> {
    let scheme = config.and_then(QuantizationConfig::kv_cache);
    let is_scale = |name: &str| {
        let end = |end| name.ends_with(end);
        end(".k_scale")
            || end(".v_scale")
            || end(".k_proj.output_scale")
            || end(".v_proj.output_scale")
    };
    let values = |name: &str| -> candle_core::Result<Vec<f32>> {
        let view = checkpoint.view(name)?;
        let tensor = view.load(&Device::Cpu)?.to_dtype(DType::F32)?;
        tensor.flatten_all()?.to_vec1()
    };
    let scales: BTreeMap<String, Vec<f32>> = checkpoint
        .names()
        .filter(|name| is_scale(name))
        // What has no values is among the plan's problems.
        .map(|name| (name.to_string(), values(name).unwrap_or_default()))
        .collect();
    if scheme.is_none() && scales.is_empty() {
        return None;
    }
    Some(KvCache {
        scheme: scheme.map(ToString::to_string),
        scales,
    })
}

fn totals(checkpoint: &Checkpoint, plan: &Plan) -> Totals {
    let mut totals = Totals {
        fp8_modules: plan.modules().len(),
        bytes: checkpoint.bytes(),
        ..Totals::default()
    };
    let mut loaded = 0;
    for (name, info) in checkpoint.tensors() {
        let (module, kind) = name.rsplit_once('.').unwrap_or(("", name));
        let elements = info.elements() as u64;
        let fp8 = plan.modules().get(module);
        match (fp8, kind) {
            (Some(fp8), "weight") => {
                totals.fp8_parameters += elements;
                totals.fp8_bytes += info.bytes();
                let merged = is_merged(module, plan) && !fp8.dequantized;
                if merged {
                    totals.merged_experts_bytes += 2 * elements;
                }
                loaded += match fp8.dequantized || merged {
                    true => 2 * elements,
                    false => elements,
                };
            }
            (Some(_), "input_scale") => totals.fp8_bytes += info.bytes(),
            (Some(fp8), _) if name == fp8.scale_name => {
                totals.fp8_bytes += info.bytes();
                if !fp8.dequantized && !is_merged(module, plan) {
                    loaded += 4 * elements;
                }
            }
            _ => {
                totals.dense_parameters += elements;
                totals.dense_bytes += info.bytes();
                loaded += 2 * elements;
            }
        }
    }
    if plan.problems().is_empty() {
        totals.as_bf16_bytes = Some(2 * (totals.fp8_parameters + totals.dense_parameters));
        totals.loaded_bytes = Some(loaded);
    }
    totals
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_not_the_beginning_of_another() {
        let text = "model.layers.1.mlp.up_proj.weight: stored as F8_E4M3, but …";
        assert!(mentions(text, "model.layers.1.mlp.up_proj.weight"));
        assert!(!mentions(text, "model.layers.1.mlp.up_proj"));
        assert!(!mentions(text, "layers.1.mlp.up_proj.weight"));
        assert!(!mentions(text, ""));
        assert!(mentions("\"lm_head\": INT4", "lm_head"));
        assert!(mentions("lm_head", "lm_head"));
    }
}
