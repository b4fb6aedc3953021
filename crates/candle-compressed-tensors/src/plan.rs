//! Which tensor is what: every tensor of a checkpoint against its quantization config, before anything is loaded.

use std::collections::{BTreeMap, BTreeSet};

use candle_fp8::ScaleLayout;
use compressed_tensors::{ActivationStrategy, Fp8Scheme, QuantizationConfig, WeightStrategy};
use safetensors::Dtype;

use crate::{
    Activations, Checkpoint, Error, LoadOptions, TensorInfo, Warning,
    convert::{Conversion, expert_conversions},
    kv_scales, options, scales,
};

/// What the scale of a static input is called: by llm-compressor, and by transformers in its own per-tensor FP8.
const INPUT_SCALES: [&str; 2] = ["input_scale", "activation_scale"];

/// A linear that the checkpoint stores in FP8.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Fp8Module {
    /// What the config says of it.
    pub scheme: Fp8Scheme,
    /// `[out, in]`.
    pub shape: (usize, usize),
    /// What one weight scale spans.
    pub layout: ScaleLayout,
    /// The full name of the weight's scale.
    pub scale_name: String,
    /// The static scale of the input, where the scheme has one and the checkpoint stores it.
    pub input_scale: Option<f32>,
    /// Served as a dense linear: under `dequantize`, or named in `modules_to_not_convert`.
    pub dequantized: bool,
}

/// What a checkpoint holds and how it will be served; also what is wrong with it.
///
/// [`QuantizerCompressedTensors::new`](crate::QuantizerCompressedTensors::new) makes one and refuses the checkpoint if
/// there are problems; a tool that shows them all makes its own.
#[derive(Debug, Default)]
pub struct Plan {
    pub(crate) modules: BTreeMap<String, Fp8Module>,
    /// By the full name of the tensor that is served.
    pub(crate) conversions: BTreeMap<String, Conversion>,
    /// Served name (`….self_attn.k_scale`) to stored name.
    pub(crate) kv_scales: BTreeMap<String, String>,
    pub(crate) dequantize: bool,
    problems: Vec<Error>,
    warnings: Vec<Warning>,
}

impl Plan {
    /// Looks at every tensor of `checkpoint`: headers and scales, not weights.
    pub fn new(checkpoint: &Checkpoint, options: &LoadOptions) -> Self {
        let config = match QuantizationConfig::from_model_config(checkpoint.config()) {
            Ok(config) => config,
            Err(error) => {
                return Self {
                    problems: vec![error.into()],
                    ..Self::default()
                };
            }
        };
        let mut plan = Self {
            dequantize: options.dequantize,
            ..Self::default()
        };
        if let Some(value) = config.as_ref().and_then(QuantizationConfig::run_compressed) {
            plan.dequantize |= !value;
            plan.warnings.push(Warning::RunCompressed { value });
        }
        let survey = Survey {
            checkpoint,
            config: config.as_ref(),
            options,
        };
        for (name, info) in checkpoint.tensors() {
            if let Err(error) = survey.tensor(name, info, &mut plan) {
                plan.problems.push(error);
            }
        }
        survey.warn(&mut plan);
        let experts = expert_conversions(checkpoint, &mut plan.problems);
        plan.add_experts(experts);
        plan.kv_scales = kv_scales::find(
            checkpoint,
            config.as_ref(),
            plan.dequantize,
            &mut plan.problems,
        );
        plan
    }

    /// The FP8 linears by module name.
    pub fn modules(&self) -> &BTreeMap<String, Fp8Module> {
        &self.modules
    }

    /// Whether any weight is stored in FP8.
    pub fn is_fp8(&self) -> bool {
        !self.modules.is_empty()
    }

    /// Why the checkpoint is refused: empty if it is not.
    pub fn problems(&self) -> &[Error] {
        &self.problems
    }

    /// What a user should know.
    pub fn warnings(&self) -> &[Warning] {
        &self.warnings
    }

    /// The first problem, if any, as an error.
    pub(crate) fn into_result(mut self) -> Result<Self, Error> {
        if self.problems.is_empty() {
            Ok(self)
        } else {
            Err(self.problems.swap_remove(0))
        }
    }

    /// The FP8 module that `name` is the weight of.
    pub(crate) fn weight(&self, name: &str) -> Option<&Fp8Module> {
        self.modules.get(name.strip_suffix(".weight")?)
    }

    /// The FP8 module that `name` is the weight scale of.
    pub(crate) fn weight_scale(&self, name: &str) -> Option<&Fp8Module> {
        let (module, _) = name.rsplit_once('.')?;
        self.modules
            .get(module)
            .filter(|module| module.scale_name == name)
    }

    /// Whether `name` is stored for the sake of FP8: a dequantized model has no use for it.
    pub(crate) fn is_scale(&self, name: &str) -> bool {
        let (module, kind) = name.rsplit_once('.').unwrap_or(("", name));
        (INPUT_SCALES.contains(&kind) && self.modules.contains_key(module))
            || self.weight_scale(name).is_some()
            || self.kv_scales.values().any(|stored| stored == name)
    }

    /// The stored name of the scale that is served as `name`, e.g. `….self_attn.k_scale`. None for a dequantized model: it
    /// is a plain one, and its cache keeps its precision too.
    pub(crate) fn kv_scale(&self, name: &str) -> Option<&str> {
        self.kv_scales
            .get(name)
            .filter(|_| !self.dequantize)
            .map(String::as_str)
    }

    /// Bytes of the weights that linears keep in FP8, which merged experts do not.
    pub(crate) fn linear_bytes(&self) -> u64 {
        let merged: BTreeSet<&str> = (self.conversions.values())
            .flat_map(Conversion::sources)
            .collect();
        let linears = self.modules.iter().filter(|(name, module)| {
            !module.dequantized && !merged.contains(format!("{name}.weight").as_str())
        });
        linears
            .map(|(_, module)| (module.shape.0 * module.shape.1) as u64)
            .sum()
    }

    /// Merged experts, and the cost of having them in a 2-byte dtype.
    fn add_experts(&mut self, conversions: Vec<Conversion>) {
        let mut fp8_bytes = 0;
        for conversion in conversions {
            for name in conversion.sources() {
                fp8_bytes += self
                    .weight(name)
                    .map_or(0, |module| (module.shape.0 * module.shape.1) as u64);
            }
            self.conversions
                .insert(conversion.target().to_string(), conversion);
        }
        if fp8_bytes > 0 && !self.dequantize {
            self.warnings.push(Warning::ExpertsDequantized {
                fp8_bytes,
                dense_bytes: 2 * fp8_bytes,
            });
        }
    }
}

/// One pass over the tensors.
struct Survey<'a> {
    checkpoint: &'a Checkpoint,
    config: Option<&'a QuantizationConfig>,
    options: &'a LoadOptions,
}

impl Survey<'_> {
    fn tensor(&self, name: &str, info: &TensorInfo, plan: &mut Plan) -> Result<(), Error> {
        let (module, kind) = name.rsplit_once('.').unwrap_or(("", name));
        match kind {
            "weight" if info.dtype == Dtype::F8_E4M3 => {
                let fp8 = self.fp8_module(module, name, info, plan.dequantize)?;
                plan.modules.insert(module.to_string(), fp8);
                Ok(())
            }
            "weight" => self.other_weight(module, name, info),
            "weight_packed" | "compressed" | "bitmask" => self.packed_weight(module, name),
            "weight_scale"
            | "weight_scale_inv"
            | "weight_zero_point"
            | "weight_global_scale"
            | "input_scale"
            | "activation_scale"
            | "input_zero_point"
            | "input_global_scale" => self.companion(module, kind, name),
            _ if info.dtype == Dtype::F8_E4M3 => Err(Error::NoScheme {
                tensor: name.into(),
                reason: "it is not the weight of a linear".into(),
            }),
            _ => Ok(()),
        }
    }

    fn fp8_module(
        &self,
        module: &str,
        name: &str,
        info: &TensorInfo,
        dequantize: bool,
    ) -> Result<Fp8Module, Error> {
        let no_scheme = |reason: &str| Error::NoScheme {
            tensor: name.into(),
            reason: reason.into(),
        };
        let config = self
            .config
            .ok_or_else(|| no_scheme("config.json has no quantization_config"))?;
        let class = class_of(module);
        let scheme = config.resolve(module, class)?.ok_or_else(|| {
            no_scheme(match config.is_ignored(module, class) {
                true => "the config's `ignore` names its module",
                false => "no config group targets its module",
            })
        })?;
        let &[n, k] = info.shape.as_slice() else {
            return Err(shape(name, "[out, in]", &info.shape));
        };
        if n == 0 || k == 0 {
            return Err(shape(name, "[out, in], neither of them 0", &info.shape));
        }
        let scale_name = format!("{module}.{}", scheme.scale_name);
        let layout = match scheme.weight {
            WeightStrategy::Tensor => ScaleLayout::Tensor,
            WeightStrategy::Channel => ScaleLayout::Channel,
            WeightStrategy::Block { rows, cols } => ScaleLayout::Block { rows, cols },
        };
        if self.checkpoint.info(&scale_name).is_none() {
            return Err(Error::MissingScale {
                tensor: name.into(),
                strategy: scheme.weight.to_string(),
                scale: scale_name,
            });
        }
        scales::check_shape(self.checkpoint, &scale_name, layout, n, k)?;
        scales::check_values(self.checkpoint, &scale_name)?;
        let listed = &self.options.modules_to_not_convert;
        let dequantized = dequantize
            || listed
                .iter()
                .any(|entry| options::entry_matches(entry, module));
        let input_scale = match scheme.activations {
            ActivationStrategy::StaticTensor => self.input_scale(module, name, dequantized)?,
            _ => None,
        };
        Ok(Fp8Module {
            scheme,
            shape: (n, k),
            layout,
            scale_name,
            input_scale,
            dequantized,
        })
    }

    /// The static scale of a linear's input. It may be absent only where it would not be used.
    fn input_scale(
        &self,
        module: &str,
        weight: &str,
        dequantized: bool,
    ) -> Result<Option<f32>, Error> {
        let names = INPUT_SCALES.map(|kind| format!("{module}.{kind}"));
        let stored = |name: &&String| self.checkpoint.info(name).is_some();
        let Some(name) = names.iter().find(stored) else {
            if dequantized || self.options.activations != Activations::AsCheckpoint {
                return Ok(None);
            }
            return Err(Error::MissingInputScale {
                tensor: weight.into(),
                scale: names[0].clone(),
            });
        };
        scales::check_shape(self.checkpoint, name, ScaleLayout::Tensor, 1, 1)?;
        let values = scales::check_values(self.checkpoint, name)?;
        Ok(values.first().copied())
    }

    /// A weight that is not E4M3: dense, or in a format that no op serves.
    fn other_weight(&self, module: &str, name: &str, info: &TensorInfo) -> Result<(), Error> {
        if matches!(
            info.dtype,
            Dtype::BF16 | Dtype::F16 | Dtype::F32 | Dtype::F64
        ) {
            return Ok(());
        }
        self.refused_by_config(module)?;
        Err(Error::Dtype {
            tensor: name.into(),
            expected: "F8_E4M3, BF16, F16 or F32".into(),
            found: info.dtype,
        })
    }

    /// Part of a weight that is stored packed or sparse, whatever its dtype.
    fn packed_weight(&self, module: &str, name: &str) -> Result<(), Error> {
        self.refused_by_config(module)?;
        Err(Error::Unsupported {
            tensor: name.into(),
            reason: format!(
                "packed and sparse weights are not served; expected {:?}",
                format!("{module}.weight")
            ),
        })
    }

    /// The config knows why a weight is not served: INT4, NVFP4, 2:4 sparse, …
    fn refused_by_config(&self, module: &str) -> Result<(), Error> {
        match self.config {
            Some(config) => Ok(config.resolve(module, class_of(module)).map(drop)?),
            None => Ok(()),
        }
    }

    /// A tensor that only makes sense beside an FP8 weight.
    fn companion(&self, module: &str, kind: &str, name: &str) -> Result<(), Error> {
        let stored = |kind: &str| self.checkpoint.info(&format!("{module}.{kind}"));
        if stored("weight_packed").or(stored("compressed")).is_some() {
            return Ok(()); // refused as a packed weight
        }
        let orphan = |reason: String| {
            Err(Error::OrphanScale {
                tensor: name.into(),
                reason,
            })
        };
        let weight = format!("{module}.weight");
        match self.checkpoint.info(&weight) {
            None => return orphan(format!("{weight:?} is not in the checkpoint")),
            Some(info) if info.dtype != Dtype::F8_E4M3 => {
                return orphan(format!("{weight:?} is {:?}", info.dtype));
            }
            Some(_) => {}
        }
        // A weight without a scheme is reported itself.
        let Some(Ok(Some(scheme))) = self
            .config
            .map(|config| config.resolve(module, class_of(module)))
        else {
            return Ok(());
        };
        match kind {
            _ if kind == scheme.scale_name => Ok(()),
            _ if !INPUT_SCALES.contains(&kind) => orphan(format!(
                "the config gives {weight:?} the scale {:?} alone",
                scheme.scale_name
            )),
            _ if scheme.activations == ActivationStrategy::StaticTensor => {
                let [used, other] = INPUT_SCALES;
                match kind == other && stored(used).is_some() {
                    true => orphan(format!("{:?} is there too", format!("{module}.{used}"))),
                    false => Ok(()),
                }
            }
            _ => orphan(format!(
                "the config says that activations are {}",
                scheme.activations
            )),
        }
    }

    fn warn(&self, plan: &mut Plan) {
        let modules: BTreeSet<&str> = (self.checkpoint.names())
            .filter_map(|name| {
                name.strip_suffix(".weight")
                    .or_else(|| name.strip_suffix(".weight_packed"))
            })
            .collect();
        if let Some(config) = self.config {
            let targets =
                config.unmatched_targets(modules.iter().map(|module| (*module, class_of(module))));
            if !targets.is_empty() {
                plan.warnings.push(Warning::UnmatchedTargets { targets });
            }
        }
        let unmatched = |entry: &&String| {
            !modules
                .iter()
                .any(|module| options::entry_matches(entry, module))
        };
        let entries: Vec<String> = self
            .options
            .modules_to_not_convert
            .iter()
            .filter(unmatched)
            .cloned()
            .collect();
        if !entries.is_empty() {
            plan.warnings
                .push(Warning::UnmatchedModules { modules: entries });
        }
    }
}

/// The class that a module has in its model, as far as `targets` and `ignore` can name it. A checkpoint does not store
/// classes; a matrix that is not an embedding belongs to a linear.
pub(crate) fn class_of(module: &str) -> &'static str {
    match module.rsplit('.').next() {
        Some("embed_tokens" | "wte" | "wpe" | "tok_embeddings" | "word_embeddings") => "Embedding",
        _ => "Linear",
    }
}

pub(crate) fn shape(tensor: &str, expected: &str, found: &[usize]) -> Error {
    Error::Shape {
        tensor: tensor.into(),
        expected: expected.into(),
        found: found.to_vec(),
    }
}
