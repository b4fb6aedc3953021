//! Where in config.json the quantization config sits.

use crate::{Error, json::Node};
use serde_json::Value;

/// The config, and the object around it where one was nested in another.
pub(crate) struct Located<'a> {
    pub(crate) config: Node<'a>,
    pub(crate) outer: Node<'a>,
}

impl<'a> Located<'a> {
    /// `quantization_config`, else `text_config.quantization_config` (multimodal models), else `compression_config`
    /// (old files). Each may hold the config one level deeper, under `quantization_config` with `sparsity_config`
    /// beside it.
    pub(crate) fn find(config: &'a Value) -> Result<Option<Self>, Error> {
        let root = Node::new("", config);
        root.object()?;
        let outer = root
            .child("quantization_config")
            .or_else(|| root.child("text_config")?.child("quantization_config"))
            .or_else(|| root.child("compression_config"));
        let Some(outer) = outer else { return Ok(None) };
        outer.object()?;
        let config = outer
            .child("quantization_config")
            .unwrap_or_else(|| outer.clone());
        config.object()?;
        Ok(Some(Self { config, outer }))
    }

    /// A setting that may stand in the config or beside it.
    pub(crate) fn setting(&self, key: &str) -> Option<Node<'a>> {
        self.config.child(key).or_else(|| self.outer.child(key))
    }
}

/// Removes the quantization config from all of its places, as for a checkpoint that was dequantized.
pub(crate) fn remove(config: &mut Value) {
    let Some(config) = config.as_object_mut() else {
        return;
    };
    config.shift_remove("quantization_config");
    config.shift_remove("compression_config");
    if let Some(text) = config.get_mut("text_config").and_then(Value::as_object_mut) {
        text.shift_remove("quantization_config");
    }
}
