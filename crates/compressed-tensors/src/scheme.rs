//! `Scheme`: one entry of `config_groups`, and the presets that stand for one.

use crate::{
    ActivationOrdering, Dynamic, Error, QuantizationArgs, QuantizationType, Strategy, json::Node,
};

/// One group of modules and how their weights, inputs and outputs are quantized.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scheme {
    /// The key in `config_groups`; `fp8` for `quant_method: "fp8"`, which has no groups.
    pub group: String,
    /// Module names, class names and `re:` patterns, as written.
    pub targets: Vec<String>,
    /// The weight; absent: not quantized.
    pub weights: Option<QuantizationArgs>,
    /// The input; absent: keeps its precision.
    pub input_activations: Option<QuantizationArgs>,
    /// The output; absent: keeps its precision.
    pub output_activations: Option<QuantizationArgs>,
    /// The group's own storage format; it wins over the config's.
    pub format: Option<String>,
}

const KEYS: &[&str] = &[
    "targets",
    "weights",
    "input_activations",
    "output_activations",
    "format",
];

impl Scheme {
    /// An object is a scheme; a list of targets is a preset whose name is the group's.
    pub(crate) fn parse(group: &str, node: &Node<'_>) -> Result<Self, Error> {
        if node.value.is_array() {
            return preset(group, node);
        }
        node.allow_only(KEYS)?;
        let targets = node.child("targets").ok_or_else(|| Error::Malformed {
            path: node.path_of("targets"),
            expected: "a list of module names, class names or re: patterns".to_string(),
            found: "nothing".to_string(),
        })?;
        let args = |key: &str| {
            node.child(key)
                .map(|args| QuantizationArgs::parse(&args))
                .transpose()
        };
        let scheme = Self {
            group: group.to_string(),
            targets: targets.strings()?,
            weights: args("weights")?,
            input_activations: args("input_activations")?,
            output_activations: args("output_activations")?,
            format: node
                .child("format")
                .map(|format| format.string().map(str::to_string))
                .transpose()?,
        };
        for (key, args) in [
            ("input_activations", &scheme.input_activations),
            ("output_activations", &scheme.output_activations),
        ] {
            if args.as_ref().is_some_and(|args| args.actorder.is_some()) {
                return Err(Error::InvalidArgs {
                    path: node.path_of(key),
                    reason: "actorder belongs to weights only".to_string(),
                });
            }
        }
        if scheme.format.as_deref() == Some("mixed-precision") {
            return Err(Error::InvalidArgs {
                path: node.path_of("format"),
                reason: "mixed-precision describes a whole checkpoint; a group needs the format of its own tensors"
                    .to_string(),
            });
        }
        Ok(scheme)
    }
}

/// `{"FP8_DYNAMIC": ["Linear"]}`. Presets that no FP8 op serves are translated too, so that they refuse only the
/// modules that they match.
fn preset(name: &str, node: &Node<'_>) -> Result<Scheme, Error> {
    let targets = node.strings()?;
    let (weights, input_activations) =
        preset_args(&name.to_uppercase()).ok_or_else(|| Error::UnknownPreset {
            path: node.path.clone(),
            name: name.to_string(),
            known: "FP8, FP8_DYNAMIC, FP8_BLOCK".to_string(),
        })?;
    Ok(Scheme {
        group: name.to_string(),
        targets,
        weights,
        input_activations,
        output_activations: None,
        format: None,
    })
}

type PresetArgs = (Option<QuantizationArgs>, Option<QuantizationArgs>);

fn preset_args(name: &str) -> Option<PresetArgs> {
    let fp8 = QuantizationArgs::fp8;
    let int = |num_bits, strategy, dynamic| QuantizationArgs {
        num_bits,
        kind: QuantizationType::Int,
        ..fp8(strategy, dynamic)
    };
    let group = |args: QuantizationArgs, size| QuantizationArgs {
        group_size: Some(size),
        strategy: if size == 16 {
            Strategy::TensorGroup
        } else {
            Strategy::Group
        },
        ..args
    };
    let exponent_scales = |args: QuantizationArgs| QuantizationArgs {
        scale_dtype: Some("uint8".to_string()),
        ..args
    };
    let micro = |num_bits, dynamic| {
        exponent_scales(group(
            QuantizationArgs {
                num_bits,
                ..fp8(Strategy::Group, dynamic)
            },
            32,
        ))
    };
    let nvfp4 = |dynamic| {
        group(
            QuantizationArgs {
                num_bits: 4,
                ..fp8(Strategy::TensorGroup, dynamic)
            },
            16,
        )
    };
    let token = fp8(Strategy::Token, Dynamic::Yes);
    let int4 = group(int(4, Strategy::Group, Dynamic::No), 128);
    Some(match name {
        "UNQUANTIZED" => (None, None),
        "FP8" => (
            Some(fp8(Strategy::Tensor, Dynamic::No)),
            Some(fp8(Strategy::Tensor, Dynamic::No)),
        ),
        "FP8_DYNAMIC" => (Some(fp8(Strategy::Channel, Dynamic::No)), Some(token)),
        "FP8_BLOCK" => {
            let weights = QuantizationArgs {
                block_structure: Some([128, 128]),
                ..fp8(Strategy::Block, Dynamic::No)
            };
            (
                Some(weights),
                Some(group(fp8(Strategy::Group, Dynamic::Yes), 128)),
            )
        }
        "NVFP4A16" => (Some(nvfp4(Dynamic::No)), None),
        "NVFP4" => (Some(nvfp4(Dynamic::No)), Some(nvfp4(Dynamic::Local))),
        "MXFP4A16" => (Some(micro(4, Dynamic::No)), None),
        "MXFP4" => (Some(micro(4, Dynamic::No)), Some(micro(4, Dynamic::Yes))),
        "MXFP8A16" => (Some(micro(8, Dynamic::No)), None),
        "MXFP8" => (Some(micro(8, Dynamic::No)), Some(micro(8, Dynamic::Yes))),
        "W8A8" | "INT8" => (
            Some(int(8, Strategy::Channel, Dynamic::No)),
            Some(int(8, Strategy::Token, Dynamic::Yes)),
        ),
        "W4A16_ASYM" => (
            Some(QuantizationArgs {
                symmetric: false,
                ..int4
            }),
            None,
        ),
        "W4AFP8" => (Some(int4), Some(token)),
        _ => {
            // W{weight bits}A{activation bits}: integers, groups of 128; 16 means that activations are left alone.
            let (weight, activation) = name.strip_prefix('W')?.split_once('A')?;
            let (weight, activation) =
                (weight.parse::<u32>().ok()?, activation.parse::<u32>().ok()?);
            if !(2..=8).contains(&weight)
                || ![4, 8, 16].contains(&activation)
                || weight > activation
            {
                return None;
            }
            let inputs = (activation < 16).then(|| int(activation, Strategy::Token, Dynamic::Yes));
            (
                Some(group(int(weight, Strategy::Group, Dynamic::No), 128)),
                inputs,
            )
        }
    })
}

impl Scheme {
    /// Whether the group leaves its modules alone (preset `UNQUANTIZED`, or every role absent).
    pub(crate) fn is_empty(&self) -> bool {
        self.weights.is_none()
            && self.input_activations.is_none()
            && self.output_activations.is_none()
    }

    /// Whether GPTQ left a column permutation beside the weight.
    pub(crate) fn has_permutation(&self) -> bool {
        self.weights
            .as_ref()
            .is_some_and(|weights| weights.actorder == Some(ActivationOrdering::Group))
    }
}
