//! `sparsity_config`: refused where it says that weights are 2:4 sparse or stored as bitmasks, accepted where it only
//! reports how many zeros there are.

use crate::{Error, json::Node, targets::Ignore};

/// A sparsity that no op serves.
#[derive(Debug, Clone)]
pub(crate) struct Sparsity {
    /// For messages: `2:4 (sparse-24-bitmask)`.
    pub(crate) name: String,
    targets: Ignore,
    ignore: Ignore,
}

impl Sparsity {
    /// `None`: dense.
    pub(crate) fn parse(node: &Node<'_>) -> Result<Option<Self>, Error> {
        node.object()?;
        let word = |key: &str| {
            node.child(key)
                .map(|word| word.string().map(str::to_lowercase))
                .transpose()
                .map(Option::unwrap_or_default)
        };
        let list = |key: &str| -> Result<Ignore, Error> {
            node.child(key).map_or_else(
                || Ok(Ignore::default()),
                |list| Ignore::new(&list.strings()?, &list.path),
            )
        };
        let (format, structure) = (word("format")?, word("sparsity_structure")?);
        let targets = list("targets")?;
        let ignore = list("ignore")?;
        let stored_dense = format.is_empty() || format == "dense";
        let no_structure = matches!(structure.as_str(), "" | "unstructured" | "0:0");
        if stored_dense && no_structure {
            return Ok(None);
        }
        let name = [structure, format]
            .into_iter()
            .filter(|word| !word.is_empty())
            .collect::<Vec<_>>()
            .join(", ");
        Ok(Some(Self {
            name,
            targets,
            ignore,
        }))
    }

    /// Whether the module is sparse. Without targets it is if it is quantized.
    pub(crate) fn matches(&self, module: &str, class: &str, quantized: bool) -> bool {
        let targeted = if self.targets.is_empty() {
            quantized
        } else {
            self.targets.matches(module, class)
        };
        targeted && !self.ignore.matches(module, class)
    }
}
