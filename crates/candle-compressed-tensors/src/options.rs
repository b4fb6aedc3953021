//! What a user chooses at load.

use std::{fmt, str::FromStr};

/// How a checkpoint is loaded.
///
/// ```
/// use candle_compressed_tensors::{Activations, LoadOptions};
///
/// let options = LoadOptions { activations: Activations::Full, ..LoadOptions::default() };
/// assert!(!options.dequantize);
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LoadOptions {
    /// Fold the scales into dense weights while loading: no FP8 at run time, and the model can be trained.
    pub dequantize: bool,
    /// How the inputs of FP8 linears are treated. Without effect under `dequantize`.
    pub activations: Activations,
    /// Modules that become dense linears although the checkpoint quantizes them. An entry matches a module of that name,
    /// every module below it (`model.layers.0` matches `model.layers.0.mlp.up_proj`), and a module whose name ends in it
    /// (`up_proj` matches `model.layers.0.mlp.up_proj`).
    pub modules_to_not_convert: Vec<String>,
    /// The device that FP8 linears run on, between tensors on the CPU. `None`: where their tensors are. Their weights
    /// are uploaded as they are loaded, and do not stay on the CPU. Refused together with `dequantize`.
    ///
    /// ```no_run
    /// use candle_compressed_tensors::{Checkpoint, LoadOptions, QuantizerCompressedTensors, xpu::XpuDevice};
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_nn::Module;
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// for (index, info) in XpuDevice::list()?.iter().enumerate() {
    ///     println!("{index}: {}", info.name);
    /// }
    /// let xpu = Some(XpuDevice::new(0)?);
    /// let options = LoadOptions { xpu, ..LoadOptions::default() };
    /// let checkpoint = Checkpoint::open("path/to/model")?;
    /// let quantizer = QuantizerCompressedTensors::new(&checkpoint, options)?;
    /// let vb = quantizer.var_builder(DType::BF16, &Device::Cpu)?;
    /// let up_proj = vb.pp("model.layers.0.mlp.up_proj");
    /// let linear = quantizer.linear_no_bias(4096, 14336, up_proj)?; // on the XPU
    /// let x = Tensor::zeros((1, 4096), DType::BF16, &Device::Cpu)?;
    /// let y = linear.forward(&x)?; // on the CPU, [1, 14336]
    /// # let _ = y;
    /// # Ok(())
    /// # }
    /// ```
    #[cfg(feature = "xpu")]
    pub xpu: Option<candle_fp8_xpu::XpuDevice>,
}

/// How the inputs of FP8 linears are treated.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Activations {
    /// As config.json says: dynamic per token, per tensor or per group, static, or unquantized for weight-only checkpoints.
    #[default]
    AsCheckpoint,
    /// Always quantized dynamically per token; a stored `input_scale` is not used.
    PerToken,
    /// Activations keep their precision (W8A16).
    Full,
}

impl Activations {
    /// Every value, in the order in which `--help` lists them.
    pub const ALL: [Self; 3] = [Self::AsCheckpoint, Self::PerToken, Self::Full];

    /// The name on a command line: `as-checkpoint`, `per-token` or `full`.
    pub fn name(self) -> &'static str {
        match self {
            Self::AsCheckpoint => "as-checkpoint",
            Self::PerToken => "per-token",
            Self::Full => "full",
        }
    }
}

impl fmt::Display for Activations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Activations {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL
            .into_iter()
            .find(|activations| activations.name() == name);
        found.ok_or_else(|| {
            format!("unknown activations {name:?}: expected as-checkpoint, per-token or full")
        })
    }
}

/// Whether an entry of `modules_to_not_convert` speaks of `module`.
pub(crate) fn entry_matches(entry: &str, module: &str) -> bool {
    let dotted = |rest: &str, dot_at_end: bool| {
        rest.is_empty()
            || if dot_at_end {
                rest.ends_with('.')
            } else {
                rest.starts_with('.')
            }
    };
    module
        .strip_prefix(entry)
        .is_some_and(|rest| dotted(rest, false))
        || module
            .strip_suffix(entry)
            .is_some_and(|rest| dotted(rest, true))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_match_whole_components() {
        for (entry, module, matches) in [
            ("lm_head", "lm_head", true),
            ("lm_head", "model.lm_head", true),
            ("model.layers.0", "model.layers.0.mlp.up_proj", true),
            ("model.layers.1", "model.layers.10.mlp.up_proj", false),
            ("up_proj", "model.layers.0.mlp.gate_up_proj", false),
            ("mlp.up_proj", "model.layers.0.mlp.up_proj", true),
            ("mlp", "model.layers.0.mlp.up_proj", false),
        ] {
            assert_eq!(entry_matches(entry, module), matches, "{entry} / {module}");
        }
    }

    #[test]
    fn activations_round_trip_through_their_names() {
        for activations in Activations::ALL {
            assert_eq!(activations.to_string().parse(), Ok(activations));
        }
        assert!(
            "bf16"
                .parse::<Activations>()
                .unwrap_err()
                .contains("per-token")
        );
    }
}
