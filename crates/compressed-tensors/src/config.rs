//! `QuantizationConfig`: the parsed config, and the questions that a loader asks it.

use crate::{
    Error, Fp8Scheme, KvCacheStrategy, QuantizationArgs, Scheme, fp8,
    json::Node,
    legacy,
    locate::{self, Located},
    sparsity::Sparsity,
    targets::{self, Ignore, Targets},
};
use serde_json::Value;
use std::fmt;

/// Which family of configs this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QuantMethod {
    /// `compressed-tensors`: groups with targets.
    CompressedTensors,
    /// `fp8`: AutoFP8, or DeepSeek / Qwen block FP8.
    Fp8,
}

impl fmt::Display for QuantMethod {
    /// The format's own word.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::CompressedTensors => "compressed-tensors",
            Self::Fp8 => "fp8",
        })
    }
}

/// How a checkpoint is quantized: one scheme for each module name.
///
/// Reading it decides nothing from `quantization_status`, and a group that no FP8 op serves is no error yet:
/// [`resolve`](Self::resolve) refuses it for each module that it matches.
#[derive(Debug, Clone)]
pub struct QuantizationConfig {
    method: QuantMethod,
    groups: Vec<Scheme>,
    ignore: Vec<String>,
    format: Option<String>,
    status: Option<String>,
    run_compressed: Option<bool>,
    kv_cache: Option<QuantizationArgs>,
    raw: Value,
    targets: Targets,
    ignored: Ignore,
    sparsity: Option<Sparsity>,
    transformed: bool,
    scale_name: &'static str,
}

impl QuantizationConfig {
    /// Finds and reads the quantization config of a model's config.json. It is looked for in `quantization_config`,
    /// `text_config.quantization_config` and `compression_config`, in this order, and in each of them one
    /// `quantization_config` deeper. `Ok(None)`: the model is not quantized.
    ///
    /// # Errors
    ///
    /// A config of another quantization method, one that is malformed or contradicts itself, one that uses words or
    /// (where compressed-tensors forbids it) keys that are not the format's, empty `config_groups`, and patterns that
    /// cannot be used. Each names the place in config.json.
    pub fn from_model_config(config: &Value) -> Result<Option<Self>, Error> {
        let Some(located) = Located::find(config)? else {
            return Ok(None);
        };
        let sparsity = match located.setting("sparsity_config") {
            None => None,
            Some(node) => Sparsity::parse(&node)?,
        };
        match read_method(&located)? {
            Some(QuantMethod::CompressedTensors) => Self::read_groups(&located, sparsity).map(Some),
            Some(QuantMethod::Fp8) => Self::read_legacy(&located, sparsity).map(Some),
            None if sparsity.is_some() => Self::read_groups(&located, sparsity).map(Some),
            // An old file which only reports how many zeros there are.
            None if located.setting("sparsity_config").is_some() => Ok(None),
            None => Err(Error::MissingMethod {
                path: located.config.path.clone(),
            }),
        }
    }

    fn read_groups(located: &Located<'_>, sparsity: Option<Sparsity>) -> Result<Self, Error> {
        let node = &located.config;
        let kv_cache = node
            .child("kv_cache_scheme")
            .map(|args| QuantizationArgs::parse(&args))
            .transpose()?;
        let mut groups = Vec::new();
        let parent = node.path_of("config_groups");
        if let Some(config_groups) = node.child("config_groups") {
            for (name, scheme) in config_groups.object()? {
                groups.push(Scheme::parse(
                    name,
                    &Node::new(config_groups.path_of(name), scheme),
                )?);
            }
        }
        // A checkpoint may have a quantized cache, or sparse weights, and nothing else.
        if groups.is_empty() && kv_cache.is_none() && sparsity.is_none() {
            return Err(Error::EmptyConfigGroups { path: parent });
        }
        let (ignore, ignored) = match node.child("ignore") {
            None => (Vec::new(), Ignore::default()),
            Some(list) => {
                let entries = list.strings()?;
                let rules = Ignore::new(&entries, &list.path)?;
                (entries, rules)
            }
        };
        let paths = groups.iter().map(|scheme| {
            (
                format!("{parent}.{}", scheme.group),
                scheme.targets.as_slice(),
            )
        });
        let targets = Targets::new(paths)?;
        Ok(Self {
            method: QuantMethod::CompressedTensors,
            targets,
            groups,
            ignore,
            ignored,
            kv_cache,
            sparsity,
            scale_name: "weight_scale",
            ..Self::read_common(located)?
        })
    }

    fn read_legacy(located: &Located<'_>, sparsity: Option<Sparsity>) -> Result<Self, Error> {
        let legacy = legacy::parse(&located.config)?;
        let targets = Targets::new(std::iter::once((
            located.config.path.clone(),
            legacy.scheme.targets.as_slice(),
        )))?;
        Ok(Self {
            method: QuantMethod::Fp8,
            targets,
            groups: vec![legacy.scheme],
            ignore: legacy.skip,
            ignored: legacy.ignore,
            kv_cache: legacy.kv_cache,
            sparsity,
            scale_name: legacy.scale_name,
            ..Self::read_common(located)?
        })
    }

    /// What both methods share; the rest is empty.
    fn read_common(located: &Located<'_>) -> Result<Self, Error> {
        let text = |key: &str| {
            located
                .config
                .child(key)
                .map(|text| text.string().map(str::to_string))
                .transpose()
        };
        Ok(Self {
            method: QuantMethod::CompressedTensors,
            groups: Vec::new(),
            ignore: Vec::new(),
            format: text("format")?,
            status: text("quantization_status")?,
            run_compressed: located
                .setting("run_compressed")
                .map(|value| value.boolean())
                .transpose()?,
            kv_cache: None,
            raw: located.outer.value.clone(),
            targets: Targets::default(),
            ignored: Ignore::default(),
            sparsity: None,
            transformed: match located.setting("transform_config") {
                None => false,
                Some(node) => is_transform(&node)?,
            },
            scale_name: "weight_scale",
        })
    }

    /// The family of configs.
    pub fn quant_method(&self) -> QuantMethod {
        self.method
    }

    /// The groups in the file's order; one named `fp8` for [`QuantMethod::Fp8`].
    pub fn groups(&self) -> &[Scheme] {
        &self.groups
    }

    /// The ignore list (for [`QuantMethod::Fp8`] the skip lists), as written.
    pub fn ignore(&self) -> &[String] {
        &self.ignore
    }

    /// The storage format of all groups which name none.
    pub fn format(&self) -> Option<&str> {
        self.format.as_deref()
    }

    /// `quantization_status`, for display: nothing is decided by it.
    pub fn status(&self) -> Option<&str> {
        self.status.as_deref()
    }

    /// The deprecated `run_compressed`; `Some(false)` asks for dequantized weights.
    pub fn run_compressed(&self) -> Option<bool> {
        self.run_compressed
    }

    /// `kv_cache_scheme`, served or not; see [`resolve_kv_cache`](Self::resolve_kv_cache).
    pub fn kv_cache(&self) -> Option<&QuantizationArgs> {
        self.kv_cache.as_ref()
    }

    /// The config as found, outermost object: what a saved checkpoint keeps.
    pub fn raw(&self) -> &Value {
        &self.raw
    }

    /// Removes the quantization config from a model's config.json, wherever it sits; for saving dequantized weights.
    pub fn remove_from(config: &mut Value) {
        locate::remove(config);
    }

    /// The scheme of one module, by its dotted name and its class (`Linear`). The exact name wins over patterns, which
    /// win over classes; patterns are tried in the order of their text. `None`: ignored, or not targeted.
    pub fn scheme(&self, module: &str, class: &str) -> Option<&Scheme> {
        if self.is_ignored(module, class) {
            return None;
        }
        self.targets
            .group_of(module, class)
            .and_then(|group| self.groups.get(group))
    }

    /// Whether `ignore` names the module, its class, or a pattern which matches it.
    pub fn is_ignored(&self, module: &str, class: &str) -> bool {
        self.ignored.matches(module, class)
    }

    /// As [`scheme`](Self::scheme), translated for the FP8 ops. `Ok(None)`: the module is not quantized.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`], which names the module, the group and the reason, if no op serves the scheme: codes that
    /// are not FP8 (INT4, INT8, NVFP4, MXFP4, MXFP8), group weights, zero points, GPTQ permutations, 2:4 or bitmask
    /// sparsity, transforms, quantized outputs, packed formats.
    pub fn resolve(&self, module: &str, class: &str) -> Result<Option<Fp8Scheme>, Error> {
        let scheme = self
            .scheme(module, class)
            .filter(|scheme| !scheme.is_empty());
        let refuse = |reason: String| Error::Unsupported {
            module: module.to_string(),
            group: scheme.map_or("none", |scheme| &scheme.group).to_string(),
            reason,
        };
        let resolved = match scheme {
            None => None,
            Some(scheme) => {
                let format = scheme.format.as_deref().or(self.format.as_deref());
                fp8::resolve(scheme, format, self.scale_name).map_err(refuse)?
            }
        };
        if let Some(sparsity) = &self.sparsity
            && sparsity.matches(module, class, scheme.is_some())
        {
            return Err(refuse(format!(
                "sparse weights ({}, sparsity_config) are not served; expected dense ones",
                sparsity.name
            )));
        }
        if self.transformed && scheme.is_some() {
            return Err(refuse(
                "transforms (transform_config) are not served: without their rotations the outputs would be wrong"
                    .to_string(),
            ));
        }
        Ok(resolved)
    }

    /// `kv_cache_scheme` as a cache serves it. `Ok(None)`: the cache keeps the model's precision.
    ///
    /// # Errors
    ///
    /// [`Error::UnsupportedKvCache`] if the cache is not static, symmetric FP8 with one scale or one for each head.
    pub fn resolve_kv_cache(&self) -> Result<Option<KvCacheStrategy>, Error> {
        self.kv_cache
            .as_ref()
            .map(|args| {
                fp8::resolve_kv_cache(args).map_err(|reason| Error::UnsupportedKvCache { reason })
            })
            .transpose()
    }

    /// The targets, as written, that match none of these `(module, class)` pairs: for a warning. A module that is
    /// ignored counts as matched.
    pub fn unmatched_targets<'a>(
        &self,
        modules: impl Iterator<Item = (&'a str, &'a str)>,
    ) -> Vec<String> {
        targets::unmatched(
            self.groups.iter().flat_map(|scheme| &scheme.targets),
            modules,
        )
    }
}

/// `None`: the config names no method and has no groups.
fn read_method(located: &Located<'_>) -> Result<Option<QuantMethod>, Error> {
    let Some(node) = located.setting("quant_method") else {
        let has_groups = located.config.child("config_groups").is_some();
        return Ok(has_groups.then_some(QuantMethod::CompressedTensors));
    };
    let method = node.string()?;
    match method.to_lowercase().replace('_', "-").as_str() {
        "compressed-tensors" => Ok(Some(QuantMethod::CompressedTensors)),
        "fp8" => Ok(Some(QuantMethod::Fp8)),
        _ => Err(Error::UnsupportedMethod {
            path: node.path.clone(),
            method: method.to_string(),
        }),
    }
}

/// Whether the transform config has any group (or anything else that this crate does not know).
fn is_transform(node: &Node<'_>) -> Result<bool, Error> {
    let empty = |value: &Value| match value {
        Value::Null => true,
        Value::Object(entries) => entries.is_empty(),
        Value::Array(entries) => entries.is_empty(),
        _ => false,
    };
    Ok(!node.object()?.values().all(empty))
}
