//! Scales of the key-value cache: `self_attn.{k,v}_scale`, or `{k,v}_proj.output_scale` in older checkpoints.

use std::collections::{BTreeMap, BTreeSet};

use compressed_tensors::QuantizationConfig;

use crate::{Checkpoint, Error, plan, scales};

/// Served name (`….self_attn.k_scale`) to stored name, for every attention that has them.
///
/// Scales are taken where they are, with or without a `kv_cache_scheme`; with one, every attention must have them.
pub(crate) fn find(
    checkpoint: &Checkpoint,
    config: Option<&QuantizationConfig>,
) -> Result<BTreeMap<String, String>, Error> {
    let strategy = config.map_or(Ok(None), QuantizationConfig::resolve_kv_cache)?;
    let mut found = BTreeMap::new();
    for (name, info) in checkpoint.tensors() {
        let Some((module, kind)) = name.rsplit_once('.') else {
            continue;
        };
        let served = match kind {
            "k_scale" | "v_scale" => name.to_string(),
            "output_scale" => match module.rsplit_once('.') {
                Some((attention, "k_proj")) => format!("{attention}.k_scale"),
                Some((attention, "v_proj")) => format!("{attention}.v_scale"),
                _ => {
                    return Err(unsupported(
                        name,
                        "scales of quantized outputs are served for the KV cache alone",
                    ));
                }
            },
            "q_scale" => {
                return Err(unsupported(
                    name,
                    "quantized attention (a scale for queries) is not served",
                ));
            }
            _ => continue,
        };
        let shape = info.shape.as_slice();
        let single = shape.len() <= 2 && shape.iter().all(|dim| *dim == 1);
        let per_head = matches!(shape, [heads, 1, 1] if *heads > 0);
        if !(per_head || single) {
            return Err(plan::shape(name, "[], [1] or [heads, 1, 1]", shape));
        }
        scales::check_values(checkpoint, name)?;
        found.insert(served, name.to_string());
    }
    if strategy.is_some() || !found.is_empty() {
        check_complete(checkpoint, &found)?;
    }
    Ok(found)
}

/// Errs if an attention has no scale while its siblings in other layers do, or while none has one.
///
/// Siblings only: a vision tower beside a language model keeps its own attentions unquantized.
fn check_complete(checkpoint: &Checkpoint, found: &BTreeMap<String, String>) -> Result<(), Error> {
    let families: BTreeSet<String> = found.keys().map(|name| family(name)).collect();
    for name in checkpoint.names() {
        for (projection, scale) in [(".k_proj.weight", "k_scale"), (".v_proj.weight", "v_scale")] {
            let Some(attention) = name.strip_suffix(projection) else {
                continue;
            };
            let sibling = |scale| families.contains(&family(&format!("{attention}.{scale}")));
            let expected = families.is_empty() || sibling("k_scale") || sibling("v_scale");
            let scale = format!("{attention}.{scale}");
            if expected && !found.contains_key(&scale) {
                return Err(Error::MissingKvScale {
                    attention: attention.into(),
                    scale,
                });
            }
        }
    }
    Ok(())
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
