//! Weight conversions: from the tensors of a checkpoint to the tensors that a model asks for, and back for saving.
//!
//! A [`WeightConverter`] is source patterns, a target name and a chain of [`Operation`]s. Matched against the names of
//! a checkpoint it gives one [`Conversion`] for each target. Conversions run when the target is asked for.

mod experts;
mod operation;

pub(crate) use experts::expert_conversions;
pub use experts::expert_converters;
pub use operation::Operation;
pub(crate) use operation::{Part, Place, Stored};

use std::collections::BTreeMap;

use candle_core::{Result, Tensor};

/// Source patterns, a target, and the operations in between.
///
/// Patterns are the ends of tensor names. A `*` component stands for a number (an expert's index), the same one in
/// every source of a conversion; what comes before a pattern is kept before the target. With the sources
/// `experts.*.gate_proj.weight` and `experts.*.up_proj.weight` and the target `experts.gate_up_proj`, the name
/// `model.layers.3.mlp.experts.5.up_proj.weight` belongs to the target `model.layers.3.mlp.experts.gate_up_proj`.
#[derive(Debug, Clone, PartialEq)]
pub struct WeightConverter {
    /// Ends of the names of the tensors that are read.
    pub sources: Vec<String>,
    /// End of the name of the tensor that is served.
    pub target: String,
    /// From the sources to the target, in this order; saving undoes them from the last to the first.
    pub operations: Vec<Operation>,
}

/// A converter bound to the tensors of one checkpoint.
#[derive(Debug, Clone)]
pub struct Conversion {
    target: String,
    /// `[index][source]`: full names, in the order of the indexes and of the converter's sources.
    sources: Vec<Vec<String>>,
    operations: Vec<Operation>,
}

impl WeightConverter {
    /// The sources that `names` hold for each target: target → index → one entry for each source pattern.
    pub(crate) fn collect<'a>(
        &self,
        names: impl Iterator<Item = &'a str>,
    ) -> BTreeMap<String, BTreeMap<usize, Vec<Option<String>>>> {
        let mut targets = BTreeMap::<String, BTreeMap<usize, Vec<Option<String>>>>::new();
        for name in names {
            for (position, pattern) in self.sources.iter().enumerate() {
                let Some((prefix, index)) = match_end(pattern, name) else {
                    continue;
                };
                let target = format!("{prefix}{}", self.target);
                let sources = targets.entry(target).or_default().entry(index);
                sources.or_insert_with(|| vec![None; self.sources.len()])[position] =
                    Some(name.into());
            }
        }
        targets
    }

    pub(crate) fn bind(&self, target: String, sources: Vec<Vec<String>>) -> Conversion {
        Conversion {
            target,
            sources,
            operations: self.operations.clone(),
        }
    }
}

impl Conversion {
    /// An FP8 weight to dense values under its own name.
    pub(crate) fn dequantize(name: &str) -> Self {
        Self {
            target: name.into(),
            sources: vec![vec![name.into()]],
            operations: vec![Operation::Dequantize],
        }
    }

    /// The scale of an FP8 weight to the shape and dtype that the ops take, under its own name.
    pub(crate) fn reshape_scale(name: &str) -> Self {
        Self {
            target: name.into(),
            sources: vec![vec![name.into()]],
            operations: vec![Operation::ReshapeScale],
        }
    }

    /// The full name of the tensor that is served.
    pub fn target(&self) -> &str {
        &self.target
    }

    /// The full names of the tensors that are read.
    pub fn sources(&self) -> impl Iterator<Item = &str> {
        self.sources.iter().flatten().map(String::as_str)
    }

    /// Reads the sources and applies the operations, one index at a time: beside the result, the tensors of one
    /// index are in memory.
    pub(crate) fn load(&self, stored: Stored<'_>) -> Result<Tensor> {
        let mut operations = self
            .operations
            .split(|operation| *operation == Operation::Stack);
        let (before, after) = (operations.next().unwrap_or_default(), operations.next());
        let one = |names: &[String]| {
            let parts = names.iter().cloned().map(Part::Stored).collect();
            self.run(before, parts, stored)
        };
        let (Some(after), [first, others @ ..]) = (after, self.sources.as_slice()) else {
            return one(self.sources.first().map_or(&[], Vec::as_slice));
        };
        let part = one(first)?;
        let stack = Tensor::zeros(
            [&[self.sources.len()], part.dims()].concat(),
            part.dtype(),
            part.device(),
        )?;
        stack.slice_set(&part.unsqueeze(0)?, 0, 0)?;
        drop(part);
        for (index, names) in others.iter().enumerate() {
            stack.slice_set(&one(names)?.unsqueeze(0)?, 0, index + 1)?;
        }
        self.run(after, vec![Part::Tensor(stack)], stored)
    }

    fn run(
        &self,
        operations: &[Operation],
        parts: Vec<Part>,
        stored: Stored<'_>,
    ) -> Result<Tensor> {
        let apply =
            |parts: Result<Vec<Part>>, operation: &Operation| operation.apply(parts?, stored);
        let parts = operations.iter().fold(Ok(parts), apply)?;
        match <[Part; 1]>::try_from(parts) {
            Ok([part]) => part.tensor(stored),
            Err(parts) => candle_core::bail!(
                "{}: the operations leave {} tensors, not one",
                self.target,
                parts.len()
            ),
        }
    }

    /// The stored tensor `name`, taken back out of the converted tensor `whole`: in FP8 if it is stored so. `None` if
    /// `name` is no source.
    pub(crate) fn restore(
        &self,
        whole: &Tensor,
        name: &str,
        stored: Stored<'_>,
    ) -> Option<Result<Tensor>> {
        self.undo(&self.operations, whole, name, stored)
    }

    /// As [`restore`](Self::restore), but dequantized values stay as they are.
    pub(crate) fn restore_dense(
        &self,
        whole: &Tensor,
        name: &str,
        stored: Stored<'_>,
    ) -> Option<Result<Tensor>> {
        let keep = |operation: &&Operation| **operation != Operation::Dequantize;
        let operations: Vec<Operation> = self.operations.iter().filter(keep).copied().collect();
        self.undo(&operations, whole, name, stored)
    }

    fn undo(
        &self,
        operations: &[Operation],
        whole: &Tensor,
        name: &str,
        stored: Stored<'_>,
    ) -> Option<Result<Tensor>> {
        let holds = |names: &&Vec<String>| names.iter().any(|own| own == name);
        let (index, sources) = self
            .sources
            .iter()
            .enumerate()
            .find(|(_, names)| holds(names))?;
        let place = Place {
            index,
            name,
            sources,
        };
        let undo = |tensor: Result<Tensor>, operation: &Operation| {
            operation.undo(&tensor?, &place, stored)
        };
        Some(operations.iter().rev().fold(Ok(whole.clone()), undo))
    }
}

/// Matches the end of `name` against `pattern`; gives what comes before, and the number that `*` stands for (0 if the
/// pattern has none).
fn match_end<'a>(pattern: &str, name: &'a str) -> Option<(&'a str, usize)> {
    let (mut rest, mut index) = (name, 0);
    for (position, component) in pattern.rsplit('.').enumerate() {
        if position > 0 {
            rest = rest.strip_suffix('.')?;
        }
        let at = rest.rfind('.').map_or(0, |dot| dot + 1);
        match component {
            "*" => {
                index = rest[at..].parse().ok()?;
                // `00` and `+0` parse too, and would take the place of `0`.
                if index.to_string() != rest[at..] {
                    return None;
                }
            }
            component if component == &rest[at..] => {}
            _ => return None,
        }
        rest = &rest[..at];
    }
    Some((rest, index))
}

#[cfg(test)]
mod tests {
    use super::match_end;

    #[test]
    fn patterns_match_ends_by_component() {
        let pattern = "experts.*.up_proj.weight";
        for (name, expected) in [
            (
                "model.layers.3.mlp.experts.5.up_proj.weight",
                Some(("model.layers.3.mlp.", 5)),
            ),
            ("experts.12.up_proj.weight", Some(("", 12))),
            ("mlp.shared_experts.0.up_proj.weight", None),
            ("mlp.experts.0.gate_up_proj.weight", None),
            ("mlp.experts.x.up_proj.weight", None),
            ("mlp.experts.00.up_proj.weight", None),
            ("mlp.experts.+0.up_proj.weight", None),
            ("mlp.experts.up_proj.weight", None),
        ] {
            assert_eq!(match_end(pattern, name), expected, "{name}");
        }
    }
}
