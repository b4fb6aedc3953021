//! Scales of the key-value cache: `self_attn.{k,v}_scale`, or `{k,v}_proj.output_scale` in older checkpoints.

use std::collections::{BTreeMap, BTreeSet};

use compressed_tensors::QuantizationConfig;

use crate::{Checkpoint, Error, TensorInfo, plan, scales};

/// Served name (`….self_attn.k_scale`) to stored name, for every attention that has them.
///
/// Scales are taken where they are, with or without a `kv_cache_scheme`; with one, every attention must have them, unless
/// the model is dequantized and its cache with it.
pub(crate) fn find(
    checkpoint: &Checkpoint,
    config: Option<&QuantizationConfig>,
    dequantize: bool,
    problems: &mut Vec<Error>,
) -> BTreeMap<String, String> {
    let strategy = match config.map_or(Ok(None), QuantizationConfig::resolve_kv_cache) {
        Ok(strategy) => strategy,
        Err(error) => {
            problems.push(error.into());
            None
        }
    };
    let mut found = BTreeMap::new();
    for (name, info) in checkpoint.tensors() {
        let served = match served_name(name) {
            Ok(Some(served)) => served,
            Ok(None) => continue,
            Err(error) => {
                problems.push(error);
                continue;
            }
        };
        problems.extend(check(checkpoint, name, info, &served).err());
        if let Some(first) = found.insert(served.clone(), name.to_string()) {
            problems.push(Error::DuplicateTensor {
                tensor: served,
                first,
                second: name.into(),
            });
        }
    }
    if !dequantize && (strategy.is_some() || !found.is_empty()) {
        check_complete(checkpoint, &found, problems);
    }
    found
}

/// The name under which the scale `name` is served; `None` if it is no scale of a cache.
fn served_name(name: &str) -> Result<Option<String>, Error> {
    let (module, kind) = name.rsplit_once('.').unwrap_or(("", name));
    match (kind, module.rsplit_once('.')) {
        ("k_scale" | "v_scale", _) => Ok(Some(name.into())),
        ("output_scale", Some((attention, "k_proj"))) => Ok(Some(format!("{attention}.k_scale"))),
        ("output_scale", Some((attention, "v_proj"))) => Ok(Some(format!("{attention}.v_scale"))),
        ("output_scale", _) => Err(unsupported(
            name,
            "scales of quantized outputs are served for the KV cache alone",
        )),
        ("q_scale", _) => Err(unsupported(
            name,
            "quantized attention (a scale for queries) is not served",
        )),
        _ => Ok(None),
    }
}

/// One scale by itself: its shape, its values, and whether it belongs to anything.
fn check(
    checkpoint: &Checkpoint,
    name: &str,
    info: &TensorInfo,
    served: &str,
) -> Result<(), Error> {
    let attention = served
        .rsplit_once('.')
        .map_or("", |(attention, _)| attention);
    let below = |other: &str| {
        let rest = other.strip_prefix(attention);
        rest.is_some_and(|rest| rest.starts_with('.') && rest.contains(".weight"))
    };
    if !checkpoint.names().any(below) {
        return Err(Error::OrphanScale {
            tensor: name.into(),
            reason: format!("{attention:?} has no weights in the checkpoint"),
        });
    }
    let heads = checkpoint.number(&["num_key_value_heads"]);
    let shape = info.shape.as_slice();
    let per_head =
        matches!(shape, [found, 1, 1] if *found > 0 && heads.is_none_or(|heads| heads == *found));
    if !(per_head || scales::is_single(shape)) {
        let heads = heads.map_or("heads".to_string(), |heads| heads.to_string());
        return Err(plan::shape(
            name,
            &format!("[], [1] or [{heads}, 1, 1]"),
            shape,
        ));
    }
    scales::check_values(checkpoint, name).map(drop)
}

/// Reports every attention without a scale that its siblings in other layers have, or that none has.
///
/// Siblings only: a vision tower beside a language model keeps its own attentions unquantized.
fn check_complete(
    checkpoint: &Checkpoint,
    found: &BTreeMap<String, String>,
    problems: &mut Vec<Error>,
) {
    let families: BTreeSet<String> = found.keys().map(|name| family(name)).collect();
    let mut attentions = 0;
    for name in checkpoint.names() {
        for (projection, scale) in [(".k_proj.weight", "k_scale"), (".v_proj.weight", "v_scale")] {
            let Some(attention) = name.strip_suffix(projection) else {
                continue;
            };
            attentions += 1;
            let sibling = |scale| families.contains(&family(&format!("{attention}.{scale}")));
            let expected = families.is_empty() || sibling("k_scale") || sibling("v_scale");
            let scale = format!("{attention}.{scale}");
            if expected && !found.contains_key(&scale) {
                problems.push(Error::MissingKvScale {
                    attention: attention.into(),
                    scale,
                });
            }
        }
    }
    if attentions == 0 && found.is_empty() {
        problems.push(unsupported(
            "kv_cache_scheme",
            "the KV cache is quantized, but the checkpoint has neither scales for it nor a k_proj that they belong to",
        ));
    }
}

/// A name with its layer number left out.
fn family(name: &str) -> String {
    let components = name.split('.').map(|part| {
        if part.parse::<usize>().is_ok() {
            "*"
        } else {
            part
        }
    });
    components.collect::<Vec<_>>().join(".")
}

fn unsupported(tensor: &str, reason: &str) -> Error {
    Error::Unsupported {
        tensor: tensor.into(),
        reason: reason.into(),
    }
}
