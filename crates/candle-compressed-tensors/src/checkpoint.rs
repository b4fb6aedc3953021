//! A checkpoint on disk: `config.json`, memory-mapped safetensors, and the small files beside them.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use candle_core::safetensors::MmapedSafetensors;
use safetensors::{Dtype, tensor::TensorView};
use serde_json::Value;

use crate::{Error, header};

const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";

/// A checkpoint folder, its tensors memory-mapped. Cloning is cheap.
///
/// Nothing is read but `config.json`, the index and the headers, until a tensor is asked for.
#[derive(Clone)]
pub struct Checkpoint(Arc<Inner>);

struct Inner {
    dir: PathBuf,
    config: Value,
    shards: Vec<Shard>,
    tensors: BTreeMap<String, TensorInfo>,
}

struct Shard {
    file: String,
    mapped: MmapedSafetensors,
}

/// What a header says of one tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// The stored dtype.
    pub dtype: Dtype,
    /// The stored shape.
    pub shape: Vec<usize>,
    shard: usize,
}

impl TensorInfo {
    /// The number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bytes in the file.
    pub fn bytes(&self) -> u64 {
        stored_bytes(self.dtype, &self.shape)
    }
}

/// Bytes of a tensor in a file.
pub(crate) fn stored_bytes(dtype: Dtype, shape: &[usize]) -> u64 {
    (shape.iter().product::<usize>() * dtype.bitsize() / 8) as u64
}

impl Checkpoint {
    /// Opens the folder `dir`: `config.json`, and `model.safetensors` or the shards that
    /// `model.safetensors.index.json` names.
    ///
    /// # Errors
    /// A missing or malformed file, a shard that is not there, a truncated shard, a name that stands for two tensors.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self, Error> {
        let dir = dir.as_ref().to_path_buf();
        if !dir.is_dir() {
            let reason = if dir.exists() {
                "it is a file; give the folder that holds config.json"
            } else {
                "no such folder"
            };
            return Err(Error::NotACheckpoint {
                path: dir,
                reason: reason.into(),
            });
        }
        if !dir.join("config.json").is_file() {
            return Err(Error::NotACheckpoint {
                path: dir,
                reason: "config.json is missing".into(),
            });
        }
        let config = read_json(&dir.join("config.json"))?;
        if !config.is_object() {
            return Err(Error::Json {
                path: dir.join("config.json"),
                reason: "expected a JSON object".into(),
            });
        }
        let index = if dir.join(INDEX).is_file() {
            Some(Index::read(&dir)?)
        } else {
            None
        };
        let files = match &index {
            Some(index) => index.files.clone(),
            None if dir.join(SINGLE).is_file() => vec![SINGLE.to_string()],
            None => return Err(no_weights(dir)),
        };

        let mut shards = Vec::with_capacity(files.len());
        let mut tensors = BTreeMap::<String, TensorInfo>::new();
        for (shard, file) in files.into_iter().enumerate() {
            let path = dir.join(&file);
            header::check_unique(&path, &file)?;
            // SAFETY: the usual contract of memory-mapped weights: the file is not changed while it is mapped.
            let mapped = unsafe { MmapedSafetensors::new(&path) };
            let mapped = mapped.map_err(|error| Error::Safetensors {
                path,
                reason: reason(&error),
            })?;
            for (name, view) in mapped.tensors() {
                let info = TensorInfo {
                    dtype: view.dtype(),
                    shape: view.shape().to_vec(),
                    shard,
                };
                if let Some(other) = tensors.insert(name.clone(), info) {
                    let first = shards
                        .get(other.shard)
                        .map_or(&file, |shard: &Shard| &shard.file)
                        .clone();
                    return Err(Error::DuplicateTensor {
                        tensor: name,
                        first,
                        second: file,
                    });
                }
            }
            shards.push(Shard { file, mapped });
        }
        if let Some(index) = index {
            index.check(&tensors, &shards)?;
        }
        Ok(Self(Arc::new(Inner {
            dir,
            config,
            shards,
            tensors,
        })))
    }

    /// Downloads a model from the hub, or takes it from the hub's cache, and opens it.
    ///
    /// `HF_TOKEN`, `HF_HOME`, `HF_ENDPOINT` and `HF_HUB_OFFLINE` are honoured. `revision` is a branch, a tag or a commit;
    /// `None` is `main`.
    ///
    /// # Errors
    /// Those of the download ([`Error::Hub`]), and those of [`Checkpoint::open`].
    #[cfg(feature = "hub")]
    pub fn from_hub(model_id: &str, revision: Option<&str>) -> Result<Self, Error> {
        let options = crate::hub::HubOptions::from_env();
        Self::open(crate::hub::download(model_id, revision, &options)?)
    }

    /// The content of `config.json`.
    pub fn config(&self) -> &Value {
        &self.0.config
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.0.dir
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.tensors.keys().map(String::as_str)
    }

    /// Names and headers of all tensors, sorted by name.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &TensorInfo)> {
        self.0
            .tensors
            .iter()
            .map(|(name, info)| (name.as_str(), info))
    }

    /// What the header says of a tensor; `None` if there is no such tensor.
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.0.tensors.get(name)
    }

    /// Bytes of all tensors in the files.
    pub fn bytes(&self) -> u64 {
        self.0.tensors.values().map(TensorInfo::bytes).sum()
    }

    /// The first of these keys that config.json, or its `text_config`, gives a whole number.
    pub(crate) fn number(&self, keys: &[&str]) -> Option<usize> {
        let number = |value: &Value| usize::try_from(value.as_u64()?).ok();
        self.settings(keys).find_map(number)
    }

    /// What config.json, and after it its `text_config`, gives these keys.
    pub(crate) fn settings<'a>(&'a self, keys: &'a [&str]) -> impl Iterator<Item = &'a Value> {
        let places = [Some(self.config()), self.config().get("text_config")];
        (places.into_iter().flatten())
            .flat_map(move |place| keys.iter().filter_map(move |key| place.get(*key)))
    }

    /// The mapped bytes of a tensor.
    ///
    /// # Errors
    /// There is no such tensor.
    pub fn view(&self, name: &str) -> Result<TensorView<'_>, Error> {
        let not_found = || candle_core::Error::CannotFindTensor {
            path: name.to_string(),
        };
        let info = self.info(name).ok_or_else(not_found)?;
        Ok(self.0.shards[info.shard].mapped.get(name)?)
    }

    /// The path of another file of the checkpoint, such as `tokenizer.json`; `None` if it is not there.
    pub fn file(&self, name: &str) -> Option<PathBuf> {
        Some(self.0.dir.join(name)).filter(|path| path.is_file())
    }
}

impl std::fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Checkpoint({}, {} tensors)",
            self.0.dir.display(),
            self.0.tensors.len()
        )
    }
}

/// `model.safetensors.index.json`: which shard holds which tensor.
struct Index {
    path: PathBuf,
    weight_map: BTreeMap<String, String>,
    /// Every shard once, sorted.
    files: Vec<String>,
}

impl Index {
    fn read(dir: &Path) -> Result<Self, Error> {
        let path = dir.join(INDEX);
        let malformed = |reason: &str| Error::Json {
            path: path.clone(),
            reason: reason.into(),
        };
        let json = read_json(&path)?;
        let map = json
            .get("weight_map")
            .and_then(Value::as_object)
            .ok_or_else(|| malformed("weight_map is missing"))?;
        let mut weight_map = BTreeMap::new();
        for (tensor, file) in map {
            let file = file
                .as_str()
                .ok_or_else(|| malformed("weight_map must map names to file names"))?;
            // A shard lies beside its index: a path that leads elsewhere is an attack or a mistake.
            if Path::new(file).file_name().is_none_or(|name| name != file) {
                return Err(malformed(&format!("{file:?} is not a plain file name")));
            }
            if !dir.join(file).is_file() {
                return Err(Error::MissingShard {
                    index: path,
                    file: file.into(),
                });
            }
            weight_map.insert(tensor.clone(), file.to_string());
        }
        if weight_map.is_empty() {
            return Err(malformed("weight_map is empty"));
        }
        let mut files: Vec<String> = weight_map.values().cloned().collect();
        files.sort();
        files.dedup();
        Ok(Self {
            path,
            weight_map,
            files,
        })
    }

    fn check(self, tensors: &BTreeMap<String, TensorInfo>, shards: &[Shard]) -> Result<(), Error> {
        for (tensor, file) in self.weight_map {
            if tensors
                .get(&tensor)
                .is_none_or(|info| shards[info.shard].file != file)
            {
                return Err(Error::MissingTensor {
                    index: self.path,
                    tensor,
                    file,
                });
            }
        }
        Ok(())
    }
}

fn read_json(path: &Path) -> Result<Value, Error> {
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    serde_json::from_str(&text).map_err(|error| Error::Json {
        path: path.into(),
        reason: error.to_string(),
    })
}

fn no_weights(dir: PathBuf) -> Error {
    let holds = |end: &str| {
        let entries = std::fs::read_dir(&dir).into_iter().flatten().flatten();
        entries
            .into_iter()
            .any(|entry| entry.file_name().to_string_lossy().ends_with(end))
    };
    let reason = if holds(".safetensors") {
        format!("it holds safetensors files, but neither {SINGLE} nor {INDEX}")
    } else if holds(".bin") || holds(".pt") || holds(".gguf") {
        format!("{SINGLE} is missing; weights in other formats than safetensors are not read")
    } else {
        format!("neither {SINGLE} nor {INDEX} is there")
    };
    Error::NotACheckpoint { path: dir, reason }
}

/// What the reader said, without the path and the backtrace that Candle adds.
fn reason(error: &candle_core::Error) -> String {
    match error {
        candle_core::Error::WithPath { inner, .. }
        | candle_core::Error::WithBacktrace { inner, .. } => reason(inner),
        error => error.to_string(),
    }
}
