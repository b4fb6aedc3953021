//! Mixture of experts: one linear a projection and expert on disk, two stacked tensors a layer in a model.

use std::collections::BTreeMap;

use super::{Conversion, Operation, WeightConverter};
use crate::{Checkpoint, Error};

/// How the model families name the parts of their experts: the experts' module, then gate, up and down projection.
const FAMILIES: [[&str; 4]; 3] = [
    ["mlp.experts", "gate_proj", "up_proj", "down_proj"], // Qwen2-MoE, Qwen3-MoE, DeepSeek
    ["block_sparse_moe.experts", "w1", "w3", "w2"],       // Mixtral
    ["feed_forward.experts", "gate_proj", "up_proj", "down_proj"], // Llama 4
];

/// Where the families keep the number of routed experts in config.json.
const EXPERT_COUNTS: [&str; 3] = ["num_experts", "num_local_experts", "n_routed_experts"];

/// The converters that merge experts: `….experts.gate_up_proj` `[E, 2·I, H]`, gate first, and `….experts.down_proj`
/// `[E, H, I]`, for E experts of H × I.
pub fn expert_converters() -> Vec<WeightConverter> {
    let mut converters = Vec::new();
    for [experts, gate, up, down] in FAMILIES {
        let source = |projection| format!("{experts}.*.{projection}.weight");
        converters.push(WeightConverter {
            sources: vec![source(gate), source(up)],
            target: format!("{experts}.gate_up_proj"),
            operations: vec![
                Operation::Dequantize,
                Operation::Concat { dim: 0 },
                Operation::Stack,
            ],
        });
        converters.push(WeightConverter {
            sources: vec![source(down)],
            target: format!("{experts}.down_proj"),
            operations: vec![Operation::Dequantize, Operation::Stack],
        });
    }
    converters
}

/// The conversions of all experts of a checkpoint. Experts that cannot be merged, because one or one of its projections
/// is missing or because shapes differ within a layer, go to `problems`.
pub(crate) fn expert_conversions(
    checkpoint: &Checkpoint,
    problems: &mut Vec<Error>,
) -> Vec<Conversion> {
    let mut conversions = Vec::new();
    for converter in expert_converters() {
        for (target, indexes) in converter.collect(checkpoint.names()) {
            match complete(checkpoint, &converter, &target, indexes) {
                Ok(sources) => conversions.push(converter.bind(target, sources)),
                Err(error) => problems.push(error),
            }
        }
    }
    conversions
}

/// The sources of every expert from the first to the last, all there and of equal shapes.
fn complete(
    checkpoint: &Checkpoint,
    converter: &WeightConverter,
    target: &str,
    mut indexes: BTreeMap<usize, Vec<Option<String>>>,
) -> Result<Vec<Vec<String>>, Error> {
    let experts = target
        .rsplit_once('.')
        .map_or(target, |(experts, _)| experts);
    let wrong = |reason: String| Error::Experts {
        experts: experts.into(),
        reason,
    };
    let last = indexes.last_key_value().map_or(0, |(index, _)| *index);
    let count = checkpoint.number(&EXPERT_COUNTS).unwrap_or(indexes.len());
    if last >= count {
        return Err(wrong(format!(
            "expert {last} is stored, but there should be {count} experts"
        )));
    }
    let mut shapes: Option<Vec<&[usize]>> = None;
    // Not with the capacity `count`, which may be any number: the first missing expert ends the loop.
    let mut sources = Vec::new();
    for index in 0..count {
        let found = indexes.remove(&index).unwrap_or_default();
        let mut names = Vec::with_capacity(converter.sources.len());
        for (position, pattern) in converter.sources.iter().enumerate() {
            let name = found.get(position).cloned().flatten().ok_or_else(|| {
                let end = pattern
                    .rsplit_once("*.")
                    .map_or(pattern.as_str(), |(_, end)| end);
                wrong(format!(
                    "{:?} is not in the checkpoint ({count} experts expected)",
                    format!("{index}.{end}")
                ))
            })?;
            names.push(name);
        }
        let found = names
            .iter()
            .filter_map(|name| checkpoint.info(name))
            .map(|info| info.shape.as_slice());
        let found: Vec<&[usize]> = found.collect();
        // The gate and the up projection of an expert are joined: they are equal matrices.
        if found
            .iter()
            .any(|shape| shape.len() != 2 || *shape != found[0])
        {
            return Err(wrong(format!(
                "expert {index} has {names:?} of shapes {found:?}; expected equal matrices"
            )));
        }
        match &shapes {
            Some(shapes) if *shapes != found => {
                return Err(wrong(format!(
                    "expert 0 has the shapes {shapes:?}, expert {index} has {found:?}"
                )));
            }
            _ => shapes = Some(found),
        }
        sources.push(names);
    }
    Ok(sources)
}
