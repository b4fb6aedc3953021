//! `config.json` and the small files that make a folder of tensors a checkpoint.

use std::path::Path;

use candle_core::DType;
use compressed_tensors::QuantizationConfig;
use serde_json::Value;

use crate::{Checkpoint, Error, QuantizerCompressedTensors};

/// Files that are copied: those with these endings that are not weights, index or config.
const COPIED: [&str; 5] = ["json", "txt", "jinja", "model", "yaml"];

/// The dtype that config.json gives the model; BF16 if it names none.
pub(crate) fn model_dtype(checkpoint: &Checkpoint) -> DType {
    let mut names = checkpoint.settings(&["dtype", "torch_dtype"]);
    match names.find_map(Value::as_str) {
        Some("float16") => DType::F16,
        Some("float32") => DType::F32,
        _ => DType::BF16,
    }
}

/// Writes config.json (as it is, or without its quantization under `dequantize`) and copies tokenizer, templates and
/// generation settings.
pub(crate) fn write_small_files(
    quantizer: &QuantizerCompressedTensors,
    dir: &Path,
) -> Result<(), Error> {
    let from = quantizer.checkpoint().dir();
    for entry in std::fs::read_dir(from).map_err(Error::io(from))? {
        let path = entry.map_err(Error::io(from))?.path();
        let (Some(name), Some(extension)) = (path.file_name(), path.extension()) else {
            continue;
        };
        let weights = name.to_string_lossy().contains(".safetensors");
        if weights || !path.is_file() || !COPIED.iter().any(|copied| extension == *copied) {
            continue;
        }
        if name == "config.json" && quantizer.plan().dequantize {
            write_json(&dir.join(name), &plain(quantizer.checkpoint().config()))?;
        } else {
            std::fs::copy(&path, dir.join(name)).map_err(Error::io(&path))?;
        }
    }
    Ok(())
}

/// The config of the dequantized model.
fn plain(config: &Value) -> Value {
    let mut config = config.clone();
    QuantizationConfig::remove_from(&mut config);
    config
}

pub(crate) fn write_json(path: &Path, value: &Value) -> Result<(), Error> {
    let text = format!("{value:#}\n");
    std::fs::write(path, text).map_err(Error::io(path))
}
