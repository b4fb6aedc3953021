//! What can go wrong between a `config.json` and a generated token.

use candle_core::Device;

/// Result of this crate's functions.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of this crate. Every text says what was found and what would have been accepted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// `config.json` names a model that is not built here.
    #[error("unsupported architecture `{found}` ({key} in config.json); supported: {supported}")]
    UnsupportedArchitecture {
        /// The key that was read: `architectures`, `model_type` or `text_config.model_type`.
        key: String,
        /// Its value.
        found: String,
        /// The supported values of that key, comma-separated.
        supported: String,
    },

    /// A value of `config.json` that is understood but not served (another activation, another
    /// RoPE type, …).
    #[error("config.json: `{key}` is {found}, which is not supported; supported: {supported}")]
    Unsupported {
        /// Path of the key, for example `rope_scaling.rope_type`.
        key: String,
        /// The value as JSON.
        found: String,
        /// What is served.
        supported: String,
    },

    /// A key that the architecture cannot do without.
    #[error("config.json: `{key}` is missing; it is needed for {architecture}")]
    MissingKey {
        /// Path of the key.
        key: String,
        /// The architecture that needs it.
        architecture: String,
    },

    /// A key whose value has the wrong type or lies outside what makes sense.
    #[error("config.json: `{key}` is {found}; expected {expected}")]
    InvalidValue {
        /// Path of the key.
        key: String,
        /// The value as JSON.
        found: String,
        /// What would be valid.
        expected: String,
    },

    /// A forward pass would write past the end of the preallocated KV cache. Nothing was changed:
    /// the model, and the cache with its `used` positions, stay usable.
    #[error(
        "the KV cache holds {max_seq} positions and {used} are used: {new} more do not fit; \
         make a cache with a larger max_seq, or reset it"
    )]
    CacheFull {
        /// Positions already filled.
        used: usize,
        /// Positions that were to be added.
        new: usize,
        /// Capacity of the cache.
        max_seq: usize,
    },

    /// Token ids, KV cache and model do not belong together (shape, dtype, device, layers).
    #[error("{what}: expected {expected}, found {found}")]
    Mismatch {
        /// What was compared.
        what: &'static str,
        /// What the callee needs.
        expected: String,
        /// What it was given.
        found: String,
    },

    /// The model produced a logit that is NaN or infinite: the weights are damaged, or the dtype
    /// cannot hold the activations (F16 overflows at 65504).
    #[error(
        "the logits after {positions} positions are not finite: the weights are damaged, or {dtype} cannot hold this \
         model's activations (try --dtype bf16 or f32)"
    )]
    NonFiniteLogits {
        /// Positions that they follow, those of the prompt included.
        positions: usize,
        /// The model's dtype.
        dtype: &'static str,
    },

    /// A generation setting outside its range.
    #[error("generation: `{key}` is {found}; expected {expected}")]
    InvalidSetting {
        /// Field of [`GenerationConfig`](crate::GenerationConfig).
        key: &'static str,
        /// Its value.
        found: String,
        /// What would be valid.
        expected: &'static str,
    },

    /// The configuration cannot be expressed in a stock candle-transformers config struct.
    #[error("stock candle-transformers {model} cannot run this checkpoint: {reason}")]
    NotStock {
        /// The stock model, for example `llama`.
        model: &'static str,
        /// Why.
        reason: String,
    },

    /// The device has no memory left. Nothing was changed: the model, and caches with the positions that they hold,
    /// stay usable.
    #[error(
        "out of memory: {what}{}; take a smaller max_seq, a smaller batch or a shorter prompt",
        free_text(*.free)
    )]
    OutOfMemory {
        /// What was to be made: `a KV cache of 1 × 131072 positions (16.0 GiB)`.
        what: String,
        /// Bytes that are free on the device, where that is known.
        free: Option<u64>,
    },

    /// An error of Candle, or of the loader behind the `VarBuilder`.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl Error {
    /// The error, and what was going on if it is that the device has no memory left.
    pub(crate) fn during(self, device: &Device, what: impl FnOnce() -> String) -> Self {
        match self {
            Self::Candle(error) if candle_fp8::is_out_of_memory(&error) => Self::OutOfMemory {
                what: what(),
                // The first error says more than one on the way to its text.
                free: (candle_fp8::memory_usage(device).ok().flatten()).map(|usage| usage.free()),
            },
            other => other,
        }
    }
}

/// A number of bytes as people read it.
pub(crate) fn gib(bytes: u64) -> String {
    const MIB: f64 = 1048576.0;
    match bytes as f64 / MIB {
        mib if mib < 1024.0 => format!("{mib:.1} MiB"),
        mib => format!("{:.1} GiB", mib / 1024.0),
    }
}

fn free_text(free: Option<u64>) -> String {
    match free {
        Some(free) => format!(" does not fit, {} are free", gib(free)),
        None => " does not fit".to_string(),
    }
}

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(inner) => inner,
            other => candle_core::Error::wrap(other),
        }
    }
}
