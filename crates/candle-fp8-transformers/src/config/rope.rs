//! RoPE settings of a `config.json`, in both spellings.

use super::reader::Reader;
use crate::Result;

const SUPPORTED_ROPE: &str = "default, linear, llama3, yarn";

/// Rotary position embedding of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// How the frequencies are stretched for long contexts.
    pub scaling: RopeScaling,
}

/// The `rope_type` of a config, with its parameters.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Plain RoPE: `rope_type` `default`, or no `rope_scaling`.
    Default,
    /// `linear`: every frequency divided by `factor`.
    Linear {
        /// Stretch of the context.
        factor: f64,
    },
    /// `llama3` (Llama 3.1 and later): long wavelengths divided by `factor`, short ones kept, a
    /// smooth passage between.
    Llama3 {
        /// Stretch of the longest wavelengths.
        factor: f64,
        /// Wavelengths above `original_max_position_embeddings / low_freq_factor` are stretched.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_position_embeddings / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context length before stretching, in tokens.
        original_max_position_embeddings: usize,
    },
    /// `yarn`: per-frequency passage between kept and stretched, and cos/sin multiplied by
    /// `attention_factor`.
    Yarn {
        /// Stretch of the context.
        factor: f64,
        /// Context length before stretching, in tokens.
        original_max_position_embeddings: usize,
        /// Multiplier of cos and sin.
        attention_factor: f64,
        /// Rotations above which a frequency is kept.
        beta_fast: f64,
        /// Rotations below which a frequency is stretched fully.
        beta_slow: f64,
        /// Whether the bounds of the passage are rounded to whole dimensions.
        truncate: bool,
    },
}

/// Reads `rope_parameters` (transformers 5), else `rope_theta` with `rope_scaling`.
pub(super) fn read(
    config: &Reader<'_>,
    default_theta: f64,
    max_positions: usize,
) -> Result<RopeConfig> {
    let key = if config.get("rope_parameters").is_some() {
        "rope_parameters"
    } else {
        "rope_scaling"
    };
    whole_heads(config)?;
    let outer_theta = config.positive_opt("rope_theta")?;
    let Some(section) = config.get(key) else {
        return Ok(RopeConfig {
            theta: outer_theta.unwrap_or(default_theta),
            scaling: RopeScaling::Default,
        });
    };
    if !section.is_object() {
        return Err(config.invalid(key, "an object or null"));
    }
    if section
        .as_object()
        .is_some_and(|map| map.values().any(|v| v.is_object()))
    {
        return Err(config.unsupported(key, "one set of RoPE parameters for all layers"));
    }
    let path = config.path_of(key);
    let rope = Reader::new(section, &path, "its RoPE type", |_| None);
    whole_heads(&rope)?;
    let theta = rope
        .positive_opt("rope_theta")?
        .or(outer_theta)
        .unwrap_or(default_theta);
    // Old files say `type`; some carry both, and then `rope_type` is the one that is read.
    let type_key = if rope.get("rope_type").is_some() {
        "rope_type"
    } else {
        "type"
    };
    let kind = match rope.get(type_key) {
        None => "default",
        Some(value) => value
            .as_str()
            .ok_or_else(|| rope.invalid(type_key, "a string"))?,
    };
    // A top-level value (as Phi-3 writes it) wins over the one inside.
    let original = || -> Result<usize> {
        let name = "original_max_position_embeddings";
        let found = config.size_opt(name)?.or(rope.size_opt(name)?);
        Ok(found.unwrap_or(max_positions))
    };
    let scaling = match kind {
        "default" => RopeScaling::Default,
        "linear" => RopeScaling::Linear {
            factor: rope.positive("factor")?,
        },
        "llama3" => {
            let low_freq_factor = rope.positive("low_freq_factor")?;
            let high_freq_factor = rope.positive("high_freq_factor")?;
            if high_freq_factor <= low_freq_factor {
                return Err(rope.invalid("high_freq_factor", "more than low_freq_factor"));
            }
            RopeScaling::Llama3 {
                factor: rope.positive("factor")?,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings: original()?,
            }
        }
        "yarn" => read_yarn(&rope, original()?, max_positions)?,
        _ => return Err(rope.unsupported(type_key, SUPPORTED_ROPE)),
    };
    Ok(RopeConfig { theta, scaling })
}

/// Refuses a rotation of a part of each head.
fn whole_heads(holder: &Reader<'_>) -> Result<()> {
    match holder.positive_opt("partial_rotary_factor")? {
        None | Some(1.0) => Ok(()),
        Some(_) => Err(holder.unsupported("partial_rotary_factor", "1.0")),
    }
}

fn read_yarn(rope: &Reader<'_>, original: usize, max_positions: usize) -> Result<RopeScaling> {
    let factor = match rope.positive_opt("factor")? {
        Some(factor) => factor,
        None => max_positions as f64 / original as f64,
    };
    let attention_factor = match rope.positive_opt("attention_factor")? {
        Some(attention_factor) => attention_factor,
        None => {
            // The paper's `0.1 ln(s) + 1`, with DeepSeek's two multipliers when both are there.
            let scale = |m: f64| {
                if factor <= 1.0 {
                    1.0
                } else {
                    0.1 * m * factor.ln() + 1.0
                }
            };
            let multiplier = |key| rope.get(key).and_then(|value| value.as_f64());
            match (multiplier("mscale"), multiplier("mscale_all_dim")) {
                (Some(m), Some(all)) if m != 0.0 && all != 0.0 => scale(m) / scale(all),
                _ => scale(1.0),
            }
        }
    };
    Ok(RopeScaling::Yarn {
        factor,
        original_max_position_embeddings: original,
        attention_factor,
        beta_fast: rope.positive_opt("beta_fast")?.unwrap_or(32.0),
        beta_slow: rope.positive_opt("beta_slow")?.unwrap_or(1.0),
        truncate: rope.flag_opt("truncate")?.unwrap_or(true),
    })
}
