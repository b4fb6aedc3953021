//! Which model, and how it is loaded.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use candle_compressed_tensors::{Activations, Checkpoint, LoadOptions, QuantizerCompressedTensors};
use candle_core::{DType, Device};
use candle_fp8_transformers::{CausalLm, ModelConfig};
use clap::{
    Args,
    builder::{PossibleValuesParser, TypedValueParser},
};
use indicatif::{ProgressBar, ProgressStyle};

use crate::{DeviceArgs, host_memory::Watch, units};

/// A small Llama that writes stories, with FP8 linears quantized dynamically per token: a folder of `tests/checkpoints`.
pub const STORIES_LLAMA: &str = "stories-llama-fp8-dynamic";

/// A small Qwen3-MoE that writes stories on request, quantized likewise: a folder of `tests/checkpoints`.
pub const STORIES_QWEN3_MOE: &str = "stories-qwen3-moe-fp8-dynamic";

/// Flags of every example that loads a model.
#[derive(Args, Debug, Clone, Default)]
pub struct ModelArgs {
    /// Where it comes from.
    #[command(flatten)]
    pub source: SourceArgs,
    /// What becomes of its FP8 weights.
    #[command(flatten)]
    pub load: LoadArgs,
    /// Where it runs.
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// The flags `--model`, `--model-id` and `--revision`.
#[derive(Args, Debug, Clone, Default)]
#[command(next_help_heading = "Model")]
pub struct SourceArgs {
    /// Folder of a checkpoint: config.json, *.safetensors, tokenizer.json. [default: a small model of this repository]
    #[arg(long, value_name = "DIR", conflicts_with = "model_id")]
    pub model: Option<PathBuf>,

    /// Model on the Hugging Face hub, downloaded into its cache on first use. HF_HOME, HF_TOKEN, HF_ENDPOINT and
    /// HF_HUB_OFFLINE are honoured.
    #[arg(long, value_name = "OWNER/NAME")]
    pub model_id: Option<String>,

    /// Branch, tag or commit of the model on the hub. [default: main]
    #[arg(long, value_name = "REVISION", requires = "model_id")]
    pub revision: Option<String>,
}

/// The flags `--dequantize` and `--activations`.
#[derive(Args, Debug, Clone, Default)]
#[command(next_help_heading = "FP8")]
pub struct LoadArgs {
    /// Unfold FP8 weights into dense ones while loading: no FP8 at run time, and two to four times the memory.
    #[arg(long, conflicts_with = "activations")]
    pub dequantize: bool,

    /// How the inputs of FP8 linears are treated: quantized as the checkpoint says, always dynamically per token, or kept in
    /// full precision.
    #[arg(
        long,
        value_name = "MODE",
        default_value_t = Activations::AsCheckpoint,
        value_parser = PossibleValuesParser::new(Activations::ALL.map(Activations::name))
            .try_map(|name| name.parse::<Activations>())
    )]
    pub activations: Activations,
}

impl SourceArgs {
    /// Opens the checkpoint that the flags name, or else the folder `embedded` of `tests/checkpoints`
    /// ([`STORIES_LLAMA`], [`STORIES_QWEN3_MOE`]).
    ///
    /// # Errors
    /// There is no such checkpoint, or it is damaged; the text says what to do.
    pub fn open(&self, embedded: &str) -> anyhow::Result<Checkpoint> {
        if let Some(dir) = &self.model {
            return Ok(Checkpoint::open(dir)?);
        }
        if let Some(model_id) = &self.model_id {
            return from_hub(model_id, self.revision.as_deref());
        }
        let dir = embedded_dir(embedded);
        if !dir.is_dir() {
            bail!(
                "the default model is not at {}: run this from a checkout of the repository, or give --model DIR or \
                 --model-id OWNER/NAME",
                dir.display()
            );
        }
        Ok(Checkpoint::open(dir)?)
    }
}

/// The checkpoints in the repository that this was built from.
fn embedded_dir(name: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    root.join("tests").join("checkpoints").join(name)
}

#[cfg(feature = "hub")]
fn from_hub(model_id: &str, revision: Option<&str>) -> anyhow::Result<Checkpoint> {
    if Path::new(model_id).is_dir() {
        bail!(
            "`{model_id}` is a folder: open it with --model, --model-id is for models on the hub"
        );
    }
    Ok(Checkpoint::from_hub(model_id, revision)?)
}

#[cfg(not(feature = "hub"))]
fn from_hub(model_id: &str, _revision: Option<&str>) -> anyhow::Result<Checkpoint> {
    bail!(
        "this was built without the feature `hub`: download {model_id} by other means and give its folder with --model"
    )
}

impl LoadArgs {
    /// The loader's options.
    pub fn options(&self) -> LoadOptions {
        LoadOptions {
            dequantize: self.dequantize,
            activations: self.activations,
            ..LoadOptions::default()
        }
    }
}

impl ModelArgs {
    /// [`SourceArgs::open`].
    ///
    /// # Errors
    /// Those of [`SourceArgs::open`].
    pub fn open(&self, embedded: &str) -> anyhow::Result<Checkpoint> {
        self.source.open(embedded)
    }

    /// Opens and loads the model that the flags name, or else the embedded one; see [`ModelArgs::load_checkpoint`].
    ///
    /// # Errors
    /// Those of [`SourceArgs::open`], [`model_config`](Self::model_config) and
    /// [`load_checkpoint`](Self::load_checkpoint).
    pub fn load(&self, embedded: &str) -> anyhow::Result<Loaded> {
        let checkpoint = self.open(embedded)?;
        let config = Self::model_config(&checkpoint)?;
        self.load_checkpoint(checkpoint, config)
    }

    /// Reads `config.json`, and the end-of-text tokens of `generation_config.json`.
    ///
    /// # Errors
    /// The architecture is not built here, or a key is missing or makes no sense.
    pub fn model_config(checkpoint: &Checkpoint) -> anyhow::Result<ModelConfig> {
        let mut config = ModelConfig::from_json(checkpoint.config())
            .with_context(|| format!("cannot build the model of {}", checkpoint.dir().display()))?;
        if let Some(json) = read_json(checkpoint, "generation_config.json")? {
            config.add_generation_config(&json)?;
        }
        Ok(config)
    }

    /// The loader's options: those of [`LoadArgs::options`], and the device of `--xpu`.
    ///
    /// # Errors
    /// There is no such device, or this was built without the feature `xpu`.
    pub fn options(&self) -> anyhow::Result<LoadOptions> {
        self.device.check()?;
        Ok(LoadOptions {
            #[cfg(feature = "xpu")]
            xpu: self.device.xpu_device()?,
            ..self.load.options()
        })
    }

    /// Checks every tensor of `checkpoint` against its config, scales included. Reads no weights.
    ///
    /// # Errors
    /// The checkpoint holds what cannot be served.
    pub fn quantizer(&self, checkpoint: &Checkpoint) -> anyhow::Result<QuantizerCompressedTensors> {
        QuantizerCompressedTensors::new(checkpoint, self.options()?)
            .with_context(|| cannot_load(checkpoint))
    }

    /// Builds the model of a checked checkpoint, with a progress bar on stderr if that is a terminal.
    ///
    /// # Errors
    /// The device cannot be opened, or the checkpoint does not fit its config.
    pub fn load_quantized(
        &self,
        quantizer: QuantizerCompressedTensors,
        config: ModelConfig,
    ) -> anyhow::Result<Loaded> {
        let device = self.device.device()?;
        let usage = candle_fp8::memory_usage(&device)?;
        let (start, host_memory) = (Instant::now(), Watch::start());
        let dtype = self.device.dtype(&device);
        let checkpoint = quantizer.checkpoint().clone();

        let bar = loading_bar(checkpoint.bytes());
        let reader = quantizer.clone().with_progress({
            let bar = bar.clone();
            move |bytes| bar.inc(bytes)
        });
        let vb = reader.var_builder(dtype, &device)?;
        let model = CausalLm::load(&config, &reader, vb);
        // A GPU may still be at it.
        let model = model.and_then(|model| {
            device.synchronize()?;
            Ok(model)
        });
        bar.finish_and_clear();
        let no_room = |error: &candle_fp8_transformers::Error| match error {
            candle_fp8_transformers::Error::Candle(error) => candle_fp8::is_out_of_memory(error),
            _ => false,
        };
        let model = match (model, usage) {
            (Err(error), Some(usage)) if no_room(&error) => bail!(
                "{}: its tensors take {} in the files, and {} were free on the device{}",
                cannot_load(&checkpoint),
                units::bytes(checkpoint.bytes()),
                units::bytes(usage.free()),
                match self.load.dequantize {
                    true => "; without --dequantize they take no more than that",
                    false => "; --cpu does without it",
                }
            ),
            (model, _) => model,
        };
        Ok(Loaded {
            load_time: start.elapsed(),
            host_memory: host_memory.stop(),
            model: model.with_context(|| cannot_load(&checkpoint))?,
            checkpoint,
            quantizer,
            config,
            device,
            dtype,
        })
    }

    /// [`quantizer`](Self::quantizer) and [`load_quantized`](Self::load_quantized).
    ///
    /// # Errors
    /// Those of the two.
    pub fn load_checkpoint(
        &self,
        checkpoint: Checkpoint,
        config: ModelConfig,
    ) -> anyhow::Result<Loaded> {
        self.load_quantized(self.quantizer(&checkpoint)?, config)
    }
}

fn cannot_load(checkpoint: &Checkpoint) -> String {
    format!("cannot load {}", checkpoint.dir().display())
}

fn loading_bar(bytes: u64) -> ProgressBar {
    let bar = ProgressBar::new(bytes);
    let template = "loading [{bar:30}] {bytes}/{total_bytes} {binary_bytes_per_sec} {eta}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar
}

/// A JSON file beside the weights; `None` if it is not there.
///
/// # Errors
/// It cannot be read, or is not JSON.
pub(crate) fn read_json(
    checkpoint: &Checkpoint,
    name: &str,
) -> anyhow::Result<Option<serde_json::Value>> {
    let Some(path) = checkpoint.file(name) else {
        return Ok(None);
    };
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("cannot read {}", path.display()))?;
    let json = serde_json::from_str(&text)
        .with_context(|| format!("{} is not JSON: download it again", path.display()))?;
    Ok(Some(json))
}

/// A model and what it was made from.
pub struct Loaded {
    /// The files.
    pub checkpoint: Checkpoint,
    /// What every tensor is.
    pub quantizer: QuantizerCompressedTensors,
    /// The shape of the model.
    pub config: ModelConfig,
    /// The model.
    pub model: CausalLm,
    /// Where it runs.
    pub device: Device,
    /// What it computes in.
    pub dtype: DType,
    /// Time to read the weights, from an opened checkpoint and device.
    pub load_time: Duration,
    /// The most bytes of the host that this took, beside mapped files; where the system tells.
    pub host_memory: Option<u64>,
}

impl Loaded {
    /// How many linears the model has, and how many of them run in FP8. Each expert of a layer counts for its three.
    pub fn linears(&self) -> LinearCount {
        let mut count = LinearCount::default();
        for (_, linear) in self.model.linears() {
            count.total += 1;
            count.fp8 += usize::from(linear.is_fp8());
        }
        if let Some(moe) = &self.config.moe {
            // Merged experts are dense.
            let layers = moe.sparse_layers.iter().filter(|&&sparse| sparse).count();
            count.total += layers * moe.num_experts * 3;
        }
        count
    }

    /// Device, dtype and what becomes of activations: `cpu, f32, activations as-checkpoint`.
    pub fn setting(&self) -> String {
        let device = match self.device {
            Device::Cpu => "cpu",
            Device::Cuda(_) => "cuda",
            Device::Metal(_) => "metal",
        };
        let fp8 = match (self.quantizer.is_fp8(), self.quantizer.use_fp8_kernel()) {
            (false, _) => "not an FP8 checkpoint".to_string(),
            (true, false) => "dequantized".to_string(),
            (true, true) => format!("activations {}", self.quantizer.options().activations),
        };
        let setting = format!("{device}, {}, {fp8}", self.dtype.as_str());
        #[cfg(feature = "xpu")]
        if let Some(xpu) = &self.quantizer.options().xpu {
            return format!("{setting}, linears on {}", xpu.info().name);
        }
        setting
    }

    /// What was copied between the CPU and the device of `--xpu` until now. `None`: there is no such device.
    pub fn transfers(&self) -> Option<Transfers> {
        #[cfg(feature = "xpu")]
        if let Some(xpu) = &self.quantizer.options().xpu {
            let transfers = xpu.transfers();
            return Some(Transfers {
                copies: transfers.uploads + transfers.downloads,
                bytes: transfers.upload_bytes + transfers.download_bytes,
            });
        }
        None
    }

    /// How long loading took, and the host's memory meanwhile: `loaded in 2.31 s, host memory peak 310.0 MiB`.
    pub fn loading(&self) -> String {
        let time = units::significant(self.load_time.as_secs_f64());
        let memory = self.host_memory.map(units::bytes);
        let memory = memory.map(|bytes| format!(", host memory peak {bytes}"));
        format!("loaded in {time} s{}", memory.unwrap_or_default())
    }

    /// Bytes of the weights in memory, scales included, with a unit.
    pub fn weights(&self) -> String {
        units::bytes(self.model.weight_bytes() as u64)
    }
}

/// Copies between the CPU and a device of its own.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Transfers {
    /// How many.
    pub copies: u64,
    /// Bytes of all of them.
    pub bytes: u64,
}

/// Linears of a model. Prints as `28 of 29 linears in FP8`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LinearCount {
    /// Those whose weight stays in FP8.
    pub fp8: usize,
    /// All of them.
    pub total: usize,
}

impl std::fmt::Display for LinearCount {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} of {} linears in FP8", self.fp8, self.total)
    }
}
