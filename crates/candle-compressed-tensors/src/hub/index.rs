//! The shards that a `model.safetensors.index.json` names.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::Value;

use super::HubError;

/// The distinct file names of `weight_map`, sorted. The tensors are not looked at: opening the checkpoint does that.
pub(super) fn shards(path: &Path) -> Result<Vec<String>, HubError> {
    let bad = |reason: String| HubError::BadIndex {
        path: path.to_owned(),
        reason,
    };
    let text = std::fs::read(path).map_err(|source| HubError::Disk {
        path: path.to_owned(),
        source,
    })?;
    let index: Value = serde_json::from_slice(&text).map_err(|e| bad(format!("not JSON ({e})")))?;
    let map = index
        .get("weight_map")
        .and_then(Value::as_object)
        .ok_or_else(|| bad("it has no object `weight_map`".to_owned()))?;
    let mut shards = BTreeSet::new();
    for (tensor, shard) in map {
        let shard = shard
            .as_str()
            .ok_or_else(|| bad(format!("`weight_map` gives no file name for `{tensor}`")))?;
        shards.insert(shard.to_owned());
    }
    if shards.is_empty() {
        return Err(bad("its `weight_map` is empty".to_owned()));
    }
    Ok(shards.into_iter().collect())
}
