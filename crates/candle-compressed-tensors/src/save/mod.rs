//! A loaded model back to a checkpoint that llm-compressor, vLLM and transformers read.

mod config;
mod output;

use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap},
    path::Path,
};

use serde_json::json;

use crate::{Error, QuantizerCompressedTensors, State};
use output::{Output, Outputs};

/// How a checkpoint is written.
#[derive(Debug, Clone)]
pub struct SaveOptions {
    /// Bytes of tensors a file holds at most; above, the checkpoint is written in shards with an index. A tensor is
    /// never split. 5 GB by default.
    pub max_shard_bytes: u64,
}

impl Default for SaveOptions {
    fn default() -> Self {
        Self {
            max_shard_bytes: 5_000_000_000,
        }
    }
}

/// Writes the model whose tensors are `state` into the folder `dir`, which is made if need be.
///
/// The checkpoint that `quantizer` was made of decides on names, shapes and dtypes: scales get back their own shape and
/// dtype, merged experts become one weight and scale each, and tensors that `state` does not have (an `input_scale`, a
/// layer that the model does not use) are copied. Loading and saving therefore gives every tensor back byte for byte.
///
/// Under `dequantize` the result is a plain checkpoint: dense weights in the dtype that config.json names (BF16 if it
/// names none), no scales, no quantization config.
///
/// One tensor at a time is held beside those of the model.
///
/// # Errors
/// `dir` is the checkpoint's own folder or holds safetensors files already; `state` has a tensor that the checkpoint does
/// not have, or of another shape, or one that its stored form cannot hold; the disk is full.
pub fn save(
    quantizer: &QuantizerCompressedTensors,
    state: &State,
    dir: &Path,
    options: &SaveOptions,
) -> Result<(), Error> {
    let outputs = Outputs::new(quantizer, state)?;
    prepare(quantizer, dir)?;
    let shards = split(&outputs, options.max_shard_bytes);
    let count = shards.len();
    let mut weight_map = BTreeMap::new();
    for (number, shard) in (1..).zip(&shards) {
        let file = match count {
            1 => "model.safetensors".to_string(),
            _ => format!("model-{number:05}-of-{count:05}.safetensors"),
        };
        write_shard(&outputs, shard, &dir.join(&file))?;
        weight_map.extend(
            shard
                .iter()
                .map(|output| (output.name.clone(), file.clone())),
        );
    }
    if count > 1 {
        let total: u64 = outputs.list.iter().map(Output::bytes).sum();
        let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
        config::write_json(&dir.join("model.safetensors.index.json"), &index)?;
    }
    config::write_small_files(quantizer, dir)
}

/// Makes the folder, and refuses one where files would be mixed up or overwritten while they are mapped.
fn prepare(quantizer: &QuantizerCompressedTensors, dir: &Path) -> Result<(), Error> {
    std::fs::create_dir_all(dir).map_err(Error::io(dir))?;
    let refuse = |reason: &str| {
        Err(Error::Save {
            tensor: format!("into {}", dir.display()),
            reason: reason.into(),
        })
    };
    let same = |a: &Path, b: &Path| matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b);
    if same(dir, quantizer.checkpoint().dir()) {
        return refuse("the model was loaded from this folder; choose another one");
    }
    for entry in std::fs::read_dir(dir).map_err(Error::io(dir))? {
        let name = entry.map_err(Error::io(dir))?.file_name();
        if name.to_string_lossy().contains(".safetensors") {
            return refuse(&format!(
                "it holds {name:?} already; choose an empty folder"
            ));
        }
    }
    Ok(())
}

/// Groups of outputs of at most `max_bytes` each, unless a single one is larger.
fn split<'a>(outputs: &'a Outputs<'_>, max_bytes: u64) -> Vec<Vec<&'a Output>> {
    let mut shards: Vec<Vec<&Output>> = vec![Vec::new()];
    let mut bytes = 0;
    for output in &outputs.list {
        if bytes > 0 && bytes + output.bytes() > max_bytes {
            shards.push(Vec::new());
            bytes = 0;
        }
        bytes += output.bytes();
        if let Some(shard) = shards.last_mut() {
            shard.push(output);
        }
    }
    shards
}

fn write_shard(outputs: &Outputs<'_>, shard: &[&Output], path: &Path) -> Result<(), Error> {
    // The writer asks for bytes and takes no error for an answer: the first one is kept here.
    let failed = RefCell::new(None);
    let views = shard
        .iter()
        .map(|output| (output.name.as_str(), output.view(outputs, &failed)));
    // transformers refuses files without this line.
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    let written = safetensors::serialize_to_file(views, Some(metadata), path);
    let result = match (failed.take(), written) {
        (Some(error), _) => Err(error),
        (None, Ok(())) => return Ok(()),
        (None, Err(safetensors::SafeTensorError::IoError(error))) => Err(Error::io(path)(error)),
        (None, Err(error)) => Err(Error::Safetensors {
            path: path.into(),
            reason: error.to_string(),
        }),
    };
    // What is there is not a checkpoint; the error that led here says more than one about the removal.
    let _ = std::fs::remove_file(path);
    result
}
