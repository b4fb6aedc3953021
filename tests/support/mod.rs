//! The checkpoints in `tests/checkpoints` and the references beside them.

pub mod bound;
pub mod disturbed;

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
};

use candle_compressed_tensors::{Activations, Checkpoint, LoadOptions, QuantizerCompressedTensors};
use candle_core::{DType, Device, Tensor};
use candle_fp8_transformers::{CausalLm, ModelConfig};
use serde_json::Value;

/// The folder of one checkpoint.
pub fn dir(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/checkpoints")
        .join(name)
}

/// One line of `manifest.json`.
pub struct Fixture {
    pub name: String,
    pub arch: String,
    pub modes: Vec<Mode>,
    pub decoder_prefix: String,
    /// Module, group and reason that a refusal names; `None` if the checkpoint loads.
    pub refusal: Option<[String; 3]>,
}

impl Fixture {
    pub fn checkpoint(&self) -> Checkpoint {
        Checkpoint::open(dir(&self.name)).unwrap_or_else(|error| panic!("{}: {error}", self.name))
    }

    pub fn quantizer(&self, mode: Mode) -> QuantizerCompressedTensors {
        QuantizerCompressedTensors::new(&self.checkpoint(), mode.options())
            .unwrap_or_else(|error| panic!("{}: {error}", self.name))
    }

    pub fn reference(&self) -> Reference {
        Reference::open(&self.name)
    }
}

/// How a checkpoint is loaded, and which reference it is compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    AsCheckpoint,
    PerToken,
    Full,
    Dequantized,
}

impl Mode {
    pub const ALL: [Self; 4] = [
        Self::AsCheckpoint,
        Self::PerToken,
        Self::Full,
        Self::Dequantized,
    ];

    /// The end of the reference tensors' names.
    pub fn name(self) -> &'static str {
        match self {
            Self::AsCheckpoint => "as_checkpoint",
            Self::PerToken => "per_token",
            Self::Full => "full",
            Self::Dequantized => "dequantized",
        }
    }

    pub fn options(self) -> LoadOptions {
        let (dequantize, activations) = match self {
            Self::AsCheckpoint => (false, Activations::AsCheckpoint),
            Self::PerToken => (false, Activations::PerToken),
            Self::Full => (false, Activations::Full),
            Self::Dequantized => (true, Activations::AsCheckpoint),
        };
        LoadOptions {
            dequantize,
            activations,
            ..LoadOptions::default()
        }
    }
}

/// Every checkpoint of `manifest.json`.
pub fn fixtures() -> Vec<Fixture> {
    let text = std::fs::read_to_string(dir("manifest.json")).expect("manifest.json");
    let lines: Vec<Value> = serde_json::from_str(&text).expect("manifest.json is JSON");
    let text = |value: &Value| value.as_str().expect("a string").to_string();
    let fixture = |line: &Value| Fixture {
        name: text(&line["name"]),
        arch: text(&line["arch"]),
        modes: (Mode::ALL.into_iter())
            .filter(|mode| {
                line["modes"]
                    .as_array()
                    .is_some_and(|modes| modes.iter().any(|m| m == mode.name()))
            })
            .collect(),
        decoder_prefix: line["decoder_prefix"]
            .as_str()
            .unwrap_or("model")
            .to_string(),
        refusal: (line["expect"] == "refuse")
            .then(|| ["module", "group", "reason"].map(|key| text(&line["refusal"][key]))),
    };
    lines.iter().map(fixture).collect()
}

/// Those that load.
pub fn loadable() -> Vec<Fixture> {
    let loadable: Vec<_> = fixtures()
        .into_iter()
        .filter(|fixture| fixture.refusal.is_none())
        .collect();
    assert!(
        loadable.len() >= 30,
        "the manifest lists only {} checkpoints that load",
        loadable.len()
    );
    loadable
}

/// The one of that name.
pub fn fixture(name: &str) -> Fixture {
    fixtures()
        .into_iter()
        .find(|fixture| fixture.name == name)
        .unwrap_or_else(|| panic!("no fixture {name}"))
}

/// `reference.safetensors`: what transformers and the float64 script computed.
pub struct Reference {
    name: String,
    tensors: HashMap<String, Tensor>,
}

impl Reference {
    pub fn open(name: &str) -> Self {
        let path = dir(name).join("reference.safetensors");
        let tensors = candle_core::safetensors::load(&path, &Device::Cpu)
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        Self {
            name: name.into(),
            tensors,
        }
    }

    pub fn get(&self, tensor: &str) -> &Tensor {
        self.tensors
            .get(tensor)
            .unwrap_or_else(|| panic!("{}: no reference tensor {tensor}", self.name))
    }

    pub fn find(&self, tensor: &str) -> Option<&Tensor> {
        self.tensors.get(tensor)
    }

    pub fn ids(&self, tensor: &str) -> Vec<u32> {
        let ids = self
            .get(tensor)
            .to_dtype(DType::U32)
            .and_then(|ids| ids.to_vec1());
        ids.unwrap_or_else(|error| panic!("{}: {tensor}: {error}", self.name))
    }

    /// The tensors whose names start with `prefix`, under the rest of their names.
    pub fn with_prefix<'a>(
        &'a self,
        prefix: &'a str,
    ) -> impl Iterator<Item = (&'a str, &'a Tensor)> {
        self.tensors
            .iter()
            .filter_map(move |(name, tensor)| Some((name.strip_prefix(prefix)?, tensor)))
    }

    /// The linears with references of their own.
    pub fn linears(&self) -> Vec<String> {
        let linear = |name: &String| {
            Some(
                name.strip_prefix("linear.")?
                    .strip_suffix(".input")?
                    .to_string(),
            )
        };
        let mut linears: Vec<String> = self.tensors.keys().filter_map(linear).collect();
        linears.sort();
        linears
    }
}

/// The values of a tensor as f64, row by row.
pub fn rows(tensor: &Tensor) -> Vec<Vec<f64>> {
    let rows = tensor
        .to_dtype(DType::F64)
        .and_then(|tensor| tensor.to_vec2());
    rows.expect("a matrix of numbers")
}

/// The largest absolute difference; NaN if there is one in either.
pub fn max_difference(a: &[Vec<f64>], b: &[Vec<f64>]) -> f64 {
    assert_eq!(
        (a.len(), a[0].len()),
        (b.len(), b[0].len()),
        "shapes differ"
    );
    let pairs = a.iter().flatten().zip(b.iter().flatten());
    pairs.fold(0., |max: f64, (a, b)| {
        let difference = (a - b).abs();
        if difference.is_nan() || max.is_nan() {
            f64::NAN
        } else {
            max.max(difference)
        }
    })
}

/// A fresh folder under the target directory, removed by the next run of the same test.
pub fn scratch(name: &str) -> PathBuf {
    let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    if dir.exists() {
        std::fs::remove_dir_all(&dir).expect("an old scratch folder can be removed");
    }
    std::fs::create_dir_all(&dir).expect("a scratch folder can be made");
    dir
}

/// A model built through the quantizer, in f32 on the CPU.
pub fn model(checkpoint: &Checkpoint, quantizer: &QuantizerCompressedTensors) -> CausalLm {
    model_on(checkpoint, quantizer, DType::F32, &Device::Cpu)
}

/// A checkpoint's model in a dtype, on a device.
pub fn model_on(
    checkpoint: &Checkpoint,
    quantizer: &QuantizerCompressedTensors,
    dtype: DType,
    device: &Device,
) -> CausalLm {
    let config =
        ModelConfig::from_json(checkpoint.config()).expect("a config that the models know");
    let vb = quantizer.var_builder(dtype, device).expect("a float dtype");
    let model = CausalLm::load(&config, quantizer, vb);
    model.unwrap_or_else(|error| panic!("{}: {error}", checkpoint.dir().display()))
}

/// Logits `[tokens, vocab]` of all positions.
pub fn logits(model: &CausalLm, ids: &[u32]) -> Vec<Vec<f64>> {
    let ids = Tensor::new(ids, model.device())
        .and_then(|ids| ids.unsqueeze(0))
        .expect("ids");
    let mut cache = model.new_cache(1, ids.elem_count()).expect("a cache");
    let logits = model.forward_all(&ids, &mut cache).expect("a forward");
    let logits = logits.to_device(&Device::Cpu).expect("a copy");
    rows(&logits.squeeze(0).expect("one sequence"))
}

/// One tensor of a safetensors file, as bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Raw {
    pub dtype: safetensors::Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

impl Raw {
    /// The one value of a BF16, F16 or F32 scale, or all of them, set to `value`.
    pub fn fill(&mut self, value: f32) {
        for index in 0..self.shape.iter().product() {
            self.set(index, value);
        }
    }

    /// One value of a BF16, F16 or F32 tensor, rounded to its dtype.
    pub fn set(&mut self, index: usize, value: f32) {
        let bytes = match self.dtype {
            safetensors::Dtype::BF16 => half::bf16::from_f32(value).to_le_bytes().to_vec(),
            safetensors::Dtype::F16 => half::f16::from_f32(value).to_le_bytes().to_vec(),
            safetensors::Dtype::F32 => value.to_le_bytes().to_vec(),
            other => panic!("{other:?} is not the dtype of a scale"),
        };
        let start = index * bytes.len();
        self.bytes[start..start + bytes.len()].copy_from_slice(&bytes);
    }

    /// The same bytes in another shape and dtype, cut or padded with zeros to fit.
    pub fn recast(&mut self, dtype: safetensors::Dtype, shape: &[usize]) {
        self.bytes
            .resize(shape.iter().product::<usize>() * dtype.bitsize() / 8, 0);
        (self.dtype, self.shape) = (dtype, shape.to_vec());
    }
}

impl safetensors::View for Raw {
    fn dtype(&self) -> safetensors::Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> std::borrow::Cow<'_, [u8]> {
        self.bytes.as_slice().into()
    }

    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

/// All tensors of the safetensors files in a folder, references left out.
pub fn raw_tensors(dir: &Path) -> BTreeMap<String, Raw> {
    let mut all = BTreeMap::new();
    for entry in std::fs::read_dir(dir).expect("a folder") {
        let path = entry.expect("an entry").path();
        let is_weights = path.extension().is_some_and(|end| end == "safetensors");
        if !is_weights || path.ends_with("reference.safetensors") {
            continue;
        }
        let file = std::fs::read(&path).expect("a file");
        let tensors = safetensors::SafeTensors::deserialize(&file).expect("safetensors");
        for (name, view) in tensors.iter() {
            let raw = Raw {
                dtype: view.dtype(),
                shape: view.shape().to_vec(),
                bytes: view.data().to_vec(),
            };
            assert!(all.insert(name.to_string(), raw).is_none(), "{name} twice");
        }
    }
    all
}

/// The checkpoint of a fixture with its tensors and config changed, in a scratch folder of its own.
pub fn changed(
    fixture: &str,
    scratch_name: &str,
    change: impl FnOnce(&mut BTreeMap<String, Raw>, &mut Value),
) -> PathBuf {
    let (from, to) = (dir(fixture), scratch(scratch_name));
    let text = std::fs::read_to_string(from.join("config.json")).expect("config.json");
    let mut config: Value = serde_json::from_str(&text).expect("JSON");
    let mut tensors = raw_tensors(&from);
    change(&mut tensors, &mut config);
    std::fs::write(to.join("config.json"), config.to_string()).expect("config.json");
    safetensors::serialize_to_file(tensors, None, &to.join("model.safetensors"))
        .expect("model.safetensors");
    to
}
