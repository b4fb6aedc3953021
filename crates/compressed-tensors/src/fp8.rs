//! From a scheme to what the FP8 ops serve, or the reason why they do not.

use crate::{Dynamic, QuantizationArgs, QuantizationType, Scheme, Strategy};
use std::fmt;

/// How an FP8 weight `[N, K]` is scaled. `weight_scale` multiplies the codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightStrategy {
    /// One scale, `[1]`.
    Tensor,
    /// One scale for each output row, `[N, 1]`.
    Channel,
    /// One scale for each block, `[ceil(N / rows), ceil(K / cols)]`.
    Block {
        /// Rows of a block, > 0.
        rows: usize,
        /// Columns of a block, > 0.
        cols: usize,
    },
}

/// How the input of an FP8 linear is quantized.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ActivationStrategy {
    /// Not at all (weight-only).
    None,
    /// With the stored `input_scale` `[1]`.
    StaticTensor,
    /// With one scale computed from the whole input.
    DynamicTensor,
    /// With one scale computed for each token.
    DynamicToken,
    /// With one scale computed for each token and each group of this many (> 0) input features.
    DynamicGroup(usize),
}

/// How K and V are scaled when they go through E4M3 on their way into the cache. Scales are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvCacheStrategy {
    /// One scale for K and one for V, `[1]`.
    Tensor,
    /// One scale for each KV head, `[H, 1, 1]`.
    AttnHead,
}

/// A module's scheme as the FP8 ops take it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fp8Scheme {
    /// The group of `config_groups` that the module matched.
    pub group: String,
    /// The weight's scales.
    pub weight: WeightStrategy,
    /// The input's quantization.
    pub activations: ActivationStrategy,
    /// Name of the scale tensor beside `weight`: `weight_scale` or `weight_scale_inv`. Both multiply.
    pub scale_name: &'static str,
}

impl fmt::Display for WeightStrategy {
    /// `tensor`, `channel`, `block 128x128`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tensor => f.pad("tensor"),
            Self::Channel => f.pad("channel"),
            Self::Block { rows, cols } => f.pad(&format!("block {rows}x{cols}")),
        }
    }
}

impl fmt::Display for ActivationStrategy {
    /// `none`, `static tensor`, `dynamic tensor`, `dynamic token`, `dynamic group 128`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.pad("none"),
            Self::StaticTensor => f.pad("static tensor"),
            Self::DynamicTensor => f.pad("dynamic tensor"),
            Self::DynamicToken => f.pad("dynamic token"),
            Self::DynamicGroup(size) => f.pad(&format!("dynamic group {size}")),
        }
    }
}

impl fmt::Display for KvCacheStrategy {
    /// `tensor`, `attn_head`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Tensor => "tensor",
            Self::AttnHead => "attn_head",
        })
    }
}

/// What this crate serves, for the end of a refusal.
const SERVED: &str =
    "served are FP8 (8-bit float, symmetric) weights with strategy tensor, channel or block";

/// `format`: the group's, else the config's. `Ok(None)`: the group quantizes nothing. Errors are reasons.
pub(crate) fn resolve(
    scheme: &Scheme,
    format: Option<&str>,
    scale_name: &'static str,
) -> Result<Option<Fp8Scheme>, String> {
    if scheme.is_empty() {
        return Ok(None);
    }
    if let Some(outputs) = &scheme.output_activations {
        return Err(format!(
            "quantized outputs ({outputs}) are not served; expected no output_activations"
        ));
    }
    let Some(weights) = &scheme.weights else {
        return Err(format!(
            "the inputs are quantized but the weights are not, which is not served; {SERVED}"
        ));
    };
    let weight = weight_strategy(scheme, weights, format)?;
    let activations = match &scheme.input_activations {
        None => ActivationStrategy::None,
        Some(inputs) => activation_strategy(inputs)?,
    };
    check_format(format)?;
    Ok(Some(Fp8Scheme {
        group: scheme.group.clone(),
        weight,
        activations,
        scale_name,
    }))
}

fn weight_strategy(
    scheme: &Scheme,
    weights: &QuantizationArgs,
    format: Option<&str>,
) -> Result<WeightStrategy, String> {
    check_numbers("weights", weights)?;
    if scheme.has_permutation() {
        return Err("actorder group stores a column permutation (g_idx), which is not served; expected actorder \
                    weight, static or none"
            .to_string());
    }
    if weights.dynamic != Dynamic::No {
        return Err(format!(
            "dynamic weights ({weights}) are not served: their scales must be stored"
        ));
    }
    match (weights.strategy, weights.block_structure) {
        (Strategy::Tensor, _) => Ok(WeightStrategy::Tensor),
        (Strategy::Channel, _) => Ok(WeightStrategy::Channel),
        (Strategy::Block, Some([rows, cols])) => Ok(WeightStrategy::Block { rows, cols }),
        _ => {
            let stored = format
                .map(|format| format!(", stored as {format},"))
                .unwrap_or_default();
            Err(format!(
                "weights of {weights}{stored} are not served; {SERVED}"
            ))
        }
    }
}

fn activation_strategy(inputs: &QuantizationArgs) -> Result<ActivationStrategy, String> {
    check_numbers("input_activations", inputs)?;
    let group = inputs
        .group_size
        .and_then(|size| usize::try_from(size).ok());
    match (inputs.strategy, inputs.dynamic, group) {
        (Strategy::Tensor, Dynamic::No, _) => Ok(ActivationStrategy::StaticTensor),
        (Strategy::Tensor, Dynamic::Yes, _) => Ok(ActivationStrategy::DynamicTensor),
        (Strategy::Token, Dynamic::Yes, _) => Ok(ActivationStrategy::DynamicToken),
        (Strategy::Group, Dynamic::Yes, Some(size)) => Ok(ActivationStrategy::DynamicGroup(size)),
        _ => Err(format!(
            "input_activations of {} {inputs} are not served; served are static tensor, and dynamic tensor, token or \
             group",
            if inputs.dynamic == Dynamic::No {
                "static"
            } else {
                "dynamic"
            }
        )),
    }
}

/// Codes must be E4M3, without zero points, with scales stored as plain floats.
fn check_numbers(role: &str, args: &QuantizationArgs) -> Result<(), String> {
    if args.kind != QuantizationType::Float || args.num_bits != 8 || args.name() == "MXFP8" {
        return Err(format!("{role} of {args} are not served; {SERVED}"));
    }
    if !args.symmetric {
        return Err(format!(
            "{role} with zero points (symmetric = false) are not served; {SERVED}"
        ));
    }
    match args.scale_dtype.as_deref() {
        None | Some("bfloat16" | "float16" | "float32" | "half" | "float") => Ok(()),
        Some(dtype) => Err(format!(
            "{role} with scales of dtype {dtype} are not served; expected bfloat16, float16 or float32"
        )),
    }
}

/// Formats that store E4M3 codes as they are. One codec reads the three `*-quantized` ones (old writers named FP8
/// `int-quantized` too); `dense` and `fakequant` stand in configs whose status never reached `compressed`.
fn check_format(format: Option<&str>) -> Result<(), String> {
    match format {
        None
        | Some(
            "float-quantized" | "naive-quantized" | "int-quantized" | "dense" | "fakequant"
            | "mixed-precision",
        ) => Ok(()),
        Some(other) => Err(format!(
            "format {other} is not served; expected float-quantized or naive-quantized"
        )),
    }
}

/// KV cache args → strategy; errors are reasons.
pub(crate) fn resolve_kv_cache(args: &QuantizationArgs) -> Result<KvCacheStrategy, String> {
    const SERVED: &str =
        "served is FP8 (8-bit float, symmetric, static) with strategy tensor or attn_head";
    if args.kind != QuantizationType::Float || args.num_bits != 8 {
        return Err(format!("a cache of {args} is not served; {SERVED}"));
    }
    if !args.symmetric {
        return Err(format!(
            "zero points (symmetric = false) are not served; {SERVED}"
        ));
    }
    match (args.strategy, args.dynamic) {
        (Strategy::Tensor, Dynamic::No) => Ok(KvCacheStrategy::Tensor),
        (Strategy::AttnHead, Dynamic::No) => Ok(KvCacheStrategy::AttnHead),
        _ => Err(format!("a cache of {args} is not served; {SERVED}")),
    }
}
