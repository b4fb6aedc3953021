//! Which module gets which scheme: targets and ignore lists against a module's name and class.

use crate::{Error, pattern::Pattern};
use std::collections::{BTreeMap, HashMap, HashSet};

/// Every module is one of these, so a target `Module` matches by class whatever the class is.
const BASE_CLASS: &str = "Module";

/// Whether `text`, no pattern, names this module or its class.
fn names(text: &str, module: &str, class: &str) -> bool {
    text == module || text == class || text == BASE_CLASS
}

/// All targets of all groups. A target that two groups share belongs to the later one, as upstream.
#[derive(Debug, Clone, Default)]
pub(crate) struct Targets {
    /// Exact names and class names → group.
    exact: HashMap<String, usize>,
    /// Patterns with their group, sorted as text.
    patterns: Vec<(Pattern, usize)>,
}

impl Targets {
    /// `groups`: for each group the path of its target list (for errors) and the targets.
    pub(crate) fn new<'a>(
        groups: impl Iterator<Item = (String, &'a [String])>,
    ) -> Result<Self, Error> {
        let mut exact = HashMap::new();
        let mut patterns = BTreeMap::new();
        for (group, (path, targets)) in groups.enumerate() {
            for target in targets {
                match target.strip_prefix("re:") {
                    Some(pattern) => {
                        patterns.insert(pattern, (Pattern::new(pattern, &path)?, group));
                    }
                    None => {
                        exact.insert(target.clone(), group);
                    }
                }
            }
        }
        Ok(Self {
            exact,
            patterns: patterns.into_values().collect(),
        })
    }

    /// The group of the target that wins: the exact name, else the first pattern, else the first class name.
    pub(crate) fn group_of(&self, module: &str, class: &str) -> Option<usize> {
        let by_name = || self.exact.get(module);
        let by_pattern = || {
            self.patterns
                .iter()
                .find(|(pattern, _)| pattern.matches(module))
                .map(|(_, group)| group)
        };
        let by_class = || {
            let mut classes = [class, BASE_CLASS];
            classes.sort_unstable();
            classes.into_iter().find_map(|class| self.exact.get(class))
        };
        by_name().or_else(by_pattern).or_else(by_class).copied()
    }
}

/// One target on its own, for the question whether it matches anything at all.
enum Target<'a> {
    Pattern(Pattern),
    Name(&'a str),
}

impl<'a> Target<'a> {
    fn new(text: &'a str, path: &str) -> Result<Self, Error> {
        Ok(match text.strip_prefix("re:") {
            Some(pattern) => Self::Pattern(Pattern::new(pattern, path)?),
            None => Self::Name(text),
        })
    }

    fn matches(&self, module: &str, class: &str) -> bool {
        match self {
            Self::Pattern(pattern) => pattern.matches(module),
            Self::Name(text) => names(text, module, class),
        }
    }
}

/// The targets which match no module, each once, in their order. They are compiled here because it is asked once.
pub(crate) fn unmatched<'t, 'm>(
    targets: impl Iterator<Item = &'t String>,
    modules: impl Iterator<Item = (&'m str, &'m str)>,
) -> Vec<String> {
    let mut open: Vec<(&String, Target<'t>)> = Vec::new();
    for target in targets {
        if open.iter().all(|(seen, _)| *seen != target) {
            // Every target compiled when the config was read.
            if let Ok(compiled) = Target::new(target, "") {
                open.push((target, compiled));
            }
        }
    }
    for (module, class) in modules {
        open.retain(|(_, target)| !target.matches(module, class));
    }
    open.into_iter().map(|(target, _)| target.clone()).collect()
}

/// An ignore list (or any unordered list of targets).
#[derive(Debug, Clone, Default)]
pub(crate) struct Ignore {
    exact: HashSet<String>,
    patterns: Vec<Pattern>,
    /// `quant_method: "fp8"` only: runs of dotted components, as `mlp.gate` in `model.layers.0.mlp.gate`.
    components: Vec<String>,
}

impl Ignore {
    /// Entries with the rules of `targets`.
    pub(crate) fn new(entries: &[String], path: &str) -> Result<Self, Error> {
        let mut ignore = Self::default();
        for entry in entries {
            match entry.strip_prefix("re:") {
                Some(pattern) => ignore.patterns.push(Pattern::new(pattern, path)?),
                None => {
                    ignore.exact.insert(entry.clone());
                }
            }
        }
        Ok(ignore)
    }

    /// Entries of `modules_to_not_convert` and `ignored_layers`: whole dotted components anywhere in the name.
    /// Writers put full names there, prefixes (`visual`) or suffixes (`lm_head`); entries with regex characters are
    /// patterns from the name's start, with or without `re:`.
    pub(crate) fn add_components(&mut self, entries: &[String], path: &str) -> Result<(), Error> {
        for entry in entries {
            let trimmed = entry.trim_matches('.');
            if let Some(pattern) = entry.strip_prefix("re:") {
                self.patterns.push(Pattern::new(pattern, path)?);
            } else if entry.contains(['*', '+', '?', '^', '$', '|', '(', '[', '\\']) {
                self.patterns.push(Pattern::new(entry, path)?);
            } else if !trimmed.is_empty() {
                self.components.push(format!(".{trimmed}."));
            }
        }
        Ok(())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.exact.is_empty() && self.patterns.is_empty() && self.components.is_empty()
    }

    pub(crate) fn matches(&self, module: &str, class: &str) -> bool {
        let contains = |text: &str| self.exact.contains(text);
        if contains(module) || contains(class) || contains(BASE_CLASS) {
            return true;
        }
        if self.patterns.iter().any(|pattern| pattern.matches(module)) {
            return true;
        }
        let dotted = format!(".{module}.");
        self.components
            .iter()
            .any(|components| dotted.contains(components.as_str()))
    }
}
