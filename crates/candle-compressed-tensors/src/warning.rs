//! What a user should know although loading goes on.

use std::{fmt, io::Write};

/// Something that a user should know, although loading goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Warning {
    /// Targets of the config that match no module of the checkpoint.
    UnmatchedTargets {
        /// The targets as config.json spells them.
        targets: Vec<String>,
    },
    /// An old config says `run_compressed`, which now is the option `dequantize`.
    RunCompressed {
        /// Its value.
        value: bool,
    },
    /// FP8 experts are merged, and merged experts are dense for now.
    ExpertsDequantized {
        /// Bytes of the experts' weights as stored, one a parameter.
        fp8_bytes: u64,
        /// Bytes of the merged experts in a 2-byte dtype.
        dense_bytes: u64,
    },
    /// Entries of `modules_to_not_convert` that match no module of the checkpoint.
    UnmatchedModules {
        /// The entries as given.
        modules: Vec<String>,
    },
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const MIB: f64 = 1024. * 1024.;
        match self {
            Self::UnmatchedTargets { targets } => {
                write!(
                    f,
                    "quantization targets that match no module of the checkpoint: {}",
                    targets.join(", ")
                )
            }
            Self::RunCompressed { value } => write!(
                f,
                "config.json says `run_compressed: {value}`, a deprecated option: taken as `dequantize: {}`",
                !value
            ),
            Self::ExpertsDequantized {
                fp8_bytes,
                dense_bytes,
            } => write!(
                f,
                "merged experts are dequantized: {:.1} MiB of FP8 weights take {:.1} MiB in BF16, twice that in F32",
                *fp8_bytes as f64 / MIB,
                *dense_bytes as f64 / MIB
            ),
            Self::UnmatchedModules { modules } => {
                write!(
                    f,
                    "modules_to_not_convert that match no module of the checkpoint: {}",
                    modules.join(", ")
                )
            }
        }
    }
}

/// Writes a warning to stderr. That nobody reads it is no reason to stop.
pub(crate) fn print(warning: &dyn fmt::Display) {
    let _ = writeln!(std::io::stderr(), "warning: {warning}");
}
