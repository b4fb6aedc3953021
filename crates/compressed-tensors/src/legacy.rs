//! `quant_method: "fp8"`, which has no groups: AutoFP8 (one scale for each tensor) and the DeepSeek / Qwen layout
//! (`weight_block_size`). Both become one scheme on every `Linear`.

use crate::{Dynamic, Error, QuantizationArgs, Scheme, Strategy, json::Node, targets::Ignore};

/// What such a config says.
pub(crate) struct Legacy {
    pub(crate) scheme: Scheme,
    /// Entries of the skip lists, as written.
    pub(crate) skip: Vec<String>,
    pub(crate) ignore: Ignore,
    pub(crate) kv_cache: Option<QuantizationArgs>,
    pub(crate) scale_name: &'static str,
}

/// The group's name where there are no groups.
const GROUP: &str = "fp8";

pub(crate) fn parse(node: &Node<'_>) -> Result<Legacy, Error> {
    if let Some(format) = node.child("fmt") {
        format.word(&[("e4m3", ()), ("e4m3fn", ()), ("float8_e4m3fn", ())])?;
    }
    if let Some(format) = node.child("scale_fmt") {
        // `ue8m0` also rounds the scales of activations up to powers of two.
        format.word(&[("float", ())])?;
    }
    let is_static = node
        .child("activation_scheme")
        .map_or(Ok(false), |scheme| {
            scheme.word(&[("static", true), ("dynamic", false)])
        })?;
    let block = node
        .child("weight_block_size")
        .map(|block| block.block())
        .transpose()?;

    let (weights, inputs) = match block {
        Some([rows, cols]) => {
            if is_static {
                return Err(node.invalid(
                    "activation_scheme static contradicts weight_block_size: block weights take dynamic group \
                     activations",
                ));
            }
            let group_size = i64::try_from(cols).ok();
            (
                QuantizationArgs {
                    block_structure: Some([rows, cols]),
                    ..QuantizationArgs::fp8(Strategy::Block, Dynamic::No)
                },
                QuantizationArgs {
                    group_size,
                    ..QuantizationArgs::fp8(Strategy::Group, Dynamic::Yes)
                },
            )
        }
        None if is_static => (
            QuantizationArgs::fp8(Strategy::Tensor, Dynamic::No),
            QuantizationArgs::fp8(Strategy::Tensor, Dynamic::No),
        ),
        None => (
            QuantizationArgs::fp8(Strategy::Tensor, Dynamic::No),
            QuantizationArgs::fp8(Strategy::Token, Dynamic::Yes),
        ),
    };

    // AutoFP8 never writes the key; transformers writes it even if null, and always names its scales `_inv`.
    let written_by_transformers = node.value.get("weight_block_size").is_some();
    let scale_name = if written_by_transformers {
        "weight_scale_inv"
    } else {
        "weight_scale"
    };

    let (mut skip, mut ignore) = (Vec::new(), Ignore::default());
    for key in ["modules_to_not_convert", "ignored_layers"] {
        if let Some(list) = node.child(key) {
            let entries = list.strings()?;
            ignore.add_components(&entries, &list.path)?;
            skip.extend(entries);
        }
    }

    let kv_cache = match node.child("kv_cache_scheme") {
        None => None,
        // AutoFP8 writes a word.
        Some(scheme) if scheme.value.is_string() => {
            scheme.word(&[("static", ())])?;
            Some(QuantizationArgs::fp8(Strategy::Tensor, Dynamic::No))
        }
        Some(scheme) => Some(QuantizationArgs::parse(&scheme)?),
    };

    let scheme = Scheme {
        group: GROUP.to_string(),
        targets: vec!["Linear".to_string()],
        weights: Some(weights),
        input_activations: Some(inputs),
        output_activations: None,
        format: None,
    };
    Ok(Legacy {
        scheme,
        skip,
        ignore,
        kv_cache,
        scale_name,
    })
}
