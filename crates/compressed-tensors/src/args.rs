//! `QuantizationArgs`: how one tensor (a weight, an input, the KV cache) is quantized.

use crate::{Error, json::Node};
use std::fmt;

/// The number family of the codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QuantizationType {
    /// Integer codes. The format's default.
    Int,
    /// Floating-point codes; with 8 bits, E4M3.
    Float,
}

/// Which elements share one scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strategy {
    /// One scale for the whole tensor.
    Tensor,
    /// One scale for each output row of a weight.
    Channel,
    /// One scale for each `group_size` elements along the input dimension.
    Group,
    /// One scale for each `block_structure` tile of a weight.
    Block,
    /// One scale for each token of an activation.
    Token,
    /// One scale for each group, times one for the tensor (NVFP4).
    TensorGroup,
    /// One scale for each attention head (KV cache).
    AttnHead,
}

/// Whether scales are computed while the model runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dynamic {
    /// Scales are stored.
    No,
    /// Scales are computed from each input.
    Yes,
    /// Group scales are computed, the tensor's is stored (NVFP4 only).
    Local,
}

/// In which order GPTQ went through the columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ActivationOrdering {
    /// By group, which leaves a `g_idx` permutation in the checkpoint (also spelled `dynamic` or `true`).
    Group,
    /// Only while calibrating; the stored format does not change (also spelled `static`).
    Weight,
}

/// How one tensor is quantized: `weights`, `input_activations`, `output_activations` or `kv_cache_scheme`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QuantizationArgs {
    /// Bits of one code; 8 if absent. Any positive number parses, only 8 is served.
    pub num_bits: u32,
    /// `type`: the number family; `int` if absent.
    pub kind: QuantizationType,
    /// Without a zero point; true if absent.
    pub symmetric: bool,
    /// Elements of a group; −1 stands for a whole row.
    pub group_size: Option<i64>,
    /// As written, or inferred: no `group_size` → tensor, positive → group, −1 → channel.
    pub strategy: Strategy,
    /// Rows and columns of a block, with strategy `block` only.
    pub block_structure: Option<[usize; 2]>,
    /// Whether scales are computed while the model runs; no if absent.
    pub dynamic: Dynamic,
    /// GPTQ's column order.
    pub actorder: Option<ActivationOrdering>,
    /// Stored dtype of the scales (without `torch.`), where the file names one.
    pub scale_dtype: Option<String>,
    /// Stored dtype of the zero points (without `torch.`), where the file names one.
    pub zp_dtype: Option<String>,
    /// The calibration observer. No influence on loading.
    pub observer: Option<String>,
}

const KEYS: &[&str] = &[
    "num_bits",
    "type",
    "symmetric",
    "group_size",
    "strategy",
    "block_structure",
    "dynamic",
    "actorder",
    "scale_dtype",
    "zp_dtype",
    "observer",
    "observer_kwargs",
];

const TYPES: &[(&str, QuantizationType)] = &[
    ("int", QuantizationType::Int),
    ("float", QuantizationType::Float),
];

const STRATEGIES: &[(&str, Strategy)] = &[
    ("tensor", Strategy::Tensor),
    ("channel", Strategy::Channel),
    ("group", Strategy::Group),
    ("block", Strategy::Block),
    ("token", Strategy::Token),
    ("tensor_group", Strategy::TensorGroup),
    ("attn_head", Strategy::AttnHead),
];

const ORDERINGS: &[(&str, ActivationOrdering)] = &[
    ("weight", ActivationOrdering::Weight),
    ("static", ActivationOrdering::Weight),
    ("group", ActivationOrdering::Group),
    ("dynamic", ActivationOrdering::Group),
];

impl QuantizationArgs {
    /// FP8 E4M3 args, symmetric; what presets and `quant_method: "fp8"` are made of.
    pub(crate) fn fp8(strategy: Strategy, dynamic: Dynamic) -> Self {
        Self {
            num_bits: 8,
            kind: QuantizationType::Float,
            symmetric: true,
            group_size: None,
            strategy,
            block_structure: None,
            dynamic,
            actorder: None,
            scale_dtype: None,
            zp_dtype: None,
            observer: None,
        }
    }

    pub(crate) fn parse(node: &Node<'_>) -> Result<Self, Error> {
        node.allow_only(KEYS)?;
        let num_bits = match node.child("num_bits") {
            None => 8,
            Some(bits) => match u32::try_from(bits.integer()?) {
                Ok(value @ 1..=64) => value,
                _ => return Err(bits.malformed("a number of bits from 1 to 64")),
            },
        };
        let kind = node
            .child("type")
            .map_or(Ok(QuantizationType::Int), |kind| kind.word(TYPES))?;
        let symmetric = node
            .child("symmetric")
            .map_or(Ok(true), |symmetric| symmetric.boolean())?;
        let group_size = match node.child("group_size") {
            None => None,
            Some(size) => match size.integer()? {
                value if value == -1 || value > 0 => Some(value),
                // 0 is tolerated upstream beside a strategy that has no groups.
                0 => Some(0),
                _ => return Err(size.malformed("a positive group size, or -1 for whole rows")),
            },
        };
        let strategy = match node.child("strategy") {
            Some(strategy) => strategy.word(STRATEGIES)?,
            None => match group_size {
                None => Strategy::Tensor,
                Some(-1) => Strategy::Channel,
                Some(size) if size > 0 => Strategy::Group,
                Some(size) => {
                    return Err(node.invalid(format!(
                        "group_size {size} names no strategy; expected a positive one or -1"
                    )));
                }
            },
        };
        let block_structure = node
            .child("block_structure")
            .map(|block| block.block())
            .transpose()?;
        let dynamic = match node.child("dynamic") {
            None => Dynamic::No,
            Some(dynamic) if dynamic.value.is_string() => {
                dynamic.word(&[("local", Dynamic::Local)])?
            }
            Some(dynamic) if dynamic.boolean()? => Dynamic::Yes,
            Some(_) => Dynamic::No,
        };
        let actorder = match node.child("actorder") {
            None => None,
            Some(order) if order.value.is_boolean() => {
                order.boolean()?.then_some(ActivationOrdering::Group)
            }
            Some(order) => Some(order.word(ORDERINGS)?),
        };
        if let Some(kwargs) = node.child("observer_kwargs") {
            kwargs.object()?;
        }
        let args = Self {
            num_bits,
            kind,
            symmetric,
            group_size,
            strategy,
            block_structure,
            dynamic,
            actorder,
            scale_dtype: parse_dtype(node, "scale_dtype")?,
            zp_dtype: parse_dtype(node, "zp_dtype")?,
            observer: node
                .child("observer")
                .map(|name| name.string().map(str::to_string))
                .transpose()?,
        };
        args.check(node)?;
        Ok(args)
    }

    /// The contradictions that compressed-tensors refuses too.
    fn check(&self, node: &Node<'_>) -> Result<(), Error> {
        let grouped = matches!(self.strategy, Strategy::Group | Strategy::TensorGroup);
        let positive = self.group_size.is_some_and(|size| size > 0);
        if grouped && !positive {
            return Err(node.invalid(format!(
                "strategy {} needs a positive group_size",
                self.strategy
            )));
        }
        if !grouped && positive {
            return Err(node.invalid(format!(
                "group_size {} contradicts strategy {}; expected group or tensor_group",
                self.group_size.unwrap_or_default(),
                self.strategy
            )));
        }
        match (self.strategy, self.block_structure) {
            (Strategy::Block, None) => {
                return Err(node.invalid("strategy block needs a block_structure, like [128, 128]"));
            }
            (Strategy::Block, Some(_)) | (_, None) => {}
            (other, Some(_)) => {
                return Err(node.invalid(format!("block_structure contradicts strategy {other}")));
            }
        }
        if self.strategy == Strategy::Token && self.dynamic == Dynamic::No {
            return Err(node.invalid(
                "strategy token needs dynamic = true: no file can store a scale for each token",
            ));
        }
        if self.dynamic == Dynamic::Local && self.strategy != Strategy::TensorGroup {
            return Err(node.invalid(format!(
                "dynamic = \"local\" needs strategy tensor_group, found {}",
                self.strategy
            )));
        }
        let can_be_dynamic = matches!(
            self.strategy,
            Strategy::Token | Strategy::Tensor | Strategy::TensorGroup | Strategy::Group
        );
        if self.dynamic != Dynamic::No && !can_be_dynamic {
            return Err(node.invalid(format!(
                "strategy {} cannot be dynamic; expected token, tensor, group or tensor_group",
                self.strategy
            )));
        }
        Ok(())
    }

    /// One phrase that names the numbers: `FP8 (E4M3)`, `INT4`, `NVFP4`, `MXFP8`, …
    pub fn name(&self) -> String {
        let scaled_by_byte = self.group_size == Some(32);
        match (self.kind, self.num_bits, self.strategy) {
            (QuantizationType::Float, 4, Strategy::TensorGroup) => "NVFP4".to_string(),
            (QuantizationType::Float, 4, Strategy::Group) if scaled_by_byte => "MXFP4".to_string(),
            (QuantizationType::Float, 8, Strategy::Group)
                if scaled_by_byte && self.dtype_is_byte() =>
            {
                "MXFP8".to_string()
            }
            (QuantizationType::Float, bits, _) => format!("FP{bits}"),
            (QuantizationType::Int, bits, _) => format!("INT{bits}"),
        }
    }

    /// Whether scales are stored as an exponent byte.
    fn dtype_is_byte(&self) -> bool {
        matches!(
            self.scale_dtype.as_deref(),
            Some("uint8" | "float8_e8m0fnu")
        )
    }
}

impl fmt::Display for QuantizationArgs {
    /// For people: `FP8 channel`, `FP8 token, dynamic`, `INT4 group 128`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.name(), self.strategy)?;
        if let (Strategy::Group | Strategy::TensorGroup, Some(size)) =
            (self.strategy, self.group_size)
        {
            write!(f, " {size}")?;
        }
        if let Some([rows, cols]) = self.block_structure {
            write!(f, " {rows}x{cols}")?;
        }
        match self.dynamic {
            Dynamic::No => Ok(()),
            Dynamic::Yes => write!(f, ", dynamic"),
            Dynamic::Local => write!(f, ", dynamic local"),
        }
    }
}

impl fmt::Display for Strategy {
    /// The format's own word.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = STRATEGIES
            .iter()
            .find(|(_, strategy)| strategy == self)
            .map_or("?", |(word, _)| word);
        f.write_str(word)
    }
}

/// `torch.uint8` and `uint8` are the same dtype.
fn parse_dtype(node: &Node<'_>, key: &str) -> Result<Option<String>, Error> {
    let Some(dtype) = node.child(key) else {
        return Ok(None);
    };
    let name = dtype.string()?;
    Ok(Some(
        name.strip_prefix("torch.").unwrap_or(name).to_string(),
    ))
}
