//! Everything that can be wrong with a checkpoint, each with the tensor's name, what was expected and what was found.

use std::path::PathBuf;

use safetensors::Dtype;

/// The error type of this crate.
///
/// Except for [`Error::Candle`], every variant is raised before a model is built: by
/// [`Checkpoint::open`](crate::Checkpoint::open) for files, by
/// [`QuantizerCompressedTensors::new`](crate::QuantizerCompressedTensors::new) for what they hold, or by
/// [`save`](crate::save()).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or folder cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A path that should be a checkpoint folder is something else.
    #[error("{} is not a checkpoint: {reason}", path.display())]
    NotACheckpoint {
        /// The path that was given.
        path: PathBuf,
        /// What is missing, and what to do.
        reason: String,
    },
    /// `config.json` or the shard index is not what it has to be.
    #[error("{}: {reason}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A safetensors file has a bad header, or is shorter than its header says.
    #[error("{}: not a valid safetensors file ({reason}); it may be truncated: download it again", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// What the reader said.
        reason: String,
    },
    /// The index names a file that is not in the folder.
    #[error("{} names the shard {file:?}, which is not there; download it again", index.display())]
    MissingShard {
        /// The index file.
        index: PathBuf,
        /// The shard that it names.
        file: String,
    },
    /// The index places a tensor in a shard that does not hold it.
    #[error("{} places tensor {tensor:?} in {file:?}, which does not hold it", index.display())]
    MissingTensor {
        /// The index file.
        index: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// The shard that should hold it.
        file: String,
    },
    /// One name stands for two tensors.
    #[error("tensor {tensor:?} is stored twice: in {first:?} and in {second:?}")]
    DuplicateTensor {
        /// The tensor's name.
        tensor: String,
        /// The first file that holds it.
        first: String,
        /// The second one; the same file when its header names the tensor twice.
        second: String,
    },
    /// The quantization config is malformed, or describes something that no op serves.
    #[error(transparent)]
    Config(#[from] compressed_tensors::Error),
    /// An FP8 weight that the config does not speak of: its codes would be read as values.
    #[error(
        "{tensor}: stored as F8_E4M3, but {reason}; without a scheme its codes have no meaning"
    )]
    NoScheme {
        /// The weight's name.
        tensor: String,
        /// Why there is no scheme: no quantization config, ignored, or matched by no group.
        reason: String,
    },
    /// An FP8 weight without its scale.
    #[error("{tensor}: stored as F8_E4M3 ({strategy}), but {scale:?} is not in the checkpoint")]
    MissingScale {
        /// The weight's name.
        tensor: String,
        /// The strategy that the config gives it.
        strategy: String,
        /// The scale that was looked for.
        scale: String,
    },
    /// A statically quantized linear without the scale of its input.
    #[error(
        "{tensor}: the config says that activations are static per tensor, but {scale:?} is not in the checkpoint; \
         load with activations `per-token` or `full`, which do not need it"
    )]
    MissingInputScale {
        /// The weight's name.
        tensor: String,
        /// The scale that was looked for.
        scale: String,
    },
    /// A quantized KV cache without its scales.
    #[error(
        "{attention}: the KV cache is quantized, but {scale:?} is not in the checkpoint; load with `dequantize`, under \
         which the cache keeps its precision"
    )]
    MissingKvScale {
        /// The attention's name.
        attention: String,
        /// The scale that was looked for.
        scale: String,
    },
    /// A scale that belongs to no FP8 weight.
    #[error("{tensor}: a scale without its FP8 weight ({reason})")]
    OrphanScale {
        /// The scale's name.
        tensor: String,
        /// What was found in the weight's place.
        reason: String,
    },
    /// A tensor has another shape than its scheme or its user asks for.
    #[error("{tensor}: expected shape {expected}, found {found:?}")]
    Shape {
        /// The tensor's name.
        tensor: String,
        /// The shapes that would do.
        expected: String,
        /// The shape in the file.
        found: Vec<usize>,
    },
    /// A tensor has a dtype that cannot be served in its place.
    #[error("{tensor}: expected dtype {expected}, found {found:?}")]
    Dtype {
        /// The tensor's name.
        tensor: String,
        /// The dtypes that would do.
        expected: String,
        /// The dtype in the file.
        found: Dtype,
    },
    /// A scale that is zero, negative, infinite or NaN.
    #[error("{tensor}: scale {value} at position {index}; every scale must be positive and finite")]
    ScaleValue {
        /// The scale's name.
        tensor: String,
        /// Its position in the flattened tensor.
        index: usize,
        /// The value found there.
        value: f32,
    },
    /// The experts of a layer are not all there, or do not agree in shape.
    #[error("{experts}: {reason}")]
    Experts {
        /// The name of the layer's experts, e.g. `model.layers.0.mlp.experts`.
        experts: String,
        /// What is missing or different.
        reason: String,
    },
    /// Something in the checkpoint that this version does not serve.
    #[error("{tensor}: {reason}")]
    Unsupported {
        /// The tensor's or the module's name.
        tensor: String,
        /// What is not served, and what to do.
        reason: String,
    },
    /// A checkpoint could not be written as asked.
    #[error("cannot save {tensor}: {reason}")]
    Save {
        /// The tensor's name, or the folder.
        tensor: String,
        /// Why not.
        reason: String,
    },
    /// The hub refused, or could not be reached.
    #[cfg(feature = "hub")]
    #[error(transparent)]
    Hub(#[from] crate::hub::HubError),
    /// Candle could not make a tensor.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl Error {
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }
}

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(error) => error,
            error => candle_core::Error::wrap(error),
        }
    }
}
