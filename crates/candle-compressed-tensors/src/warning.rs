//! What a user should know although loading goes on.

use std::{fmt, io::Write};

use candle_core::DeviceLocation;

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
    /// The FP8 ops have no kernels on the device that a model is loaded to: its linears are dense.
    NoFp8Kernels {
        /// The device.
        device: DeviceLocation,
        /// Bytes of the linears' weights as stored, one a parameter. Experts, which are merged, are not counted.
        fp8_bytes: u64,
        /// Bytes of these weights in the dtype that the model computes in.
        dense_bytes: u64,
        /// Whether the checkpoint has scales for a quantized KV cache, which then keeps its precision.
        kv_cache: bool,
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
            Self::NoFp8Kernels {
                device,
                fp8_bytes,
                dense_bytes,
                kv_cache,
            } => {
                match device {
                    DeviceLocation::Cpu => write!(f, "the CPU has no FP8 kernels")?,
                    DeviceLocation::Cuda { gpu_id } => write!(
                        f,
                        "CUDA device {gpu_id} has no FP8 kernels (they need compute capability 8.9, and the feature `cuda` of \
                         candle-fp8)"
                    )?,
                    DeviceLocation::Metal { gpu_id } => write!(
                        f,
                        "Metal device {gpu_id} has no FP8 kernels (they need Apple silicon, and the feature `metal` of \
                         candle-fp8)"
                    )?,
                }
                write!(
                    f,
                    ": linears are dequantized, and {:.1} MiB of FP8 weights take {:.1} MiB",
                    *fp8_bytes as f64 / MIB,
                    *dense_bytes as f64 / MIB
                )?;
                f.write_str(match kv_cache {
                    true => "; the KV cache is not quantized",
                    false => "",
                })
            }
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
