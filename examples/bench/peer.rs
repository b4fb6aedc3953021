//! The same shape on other people's code.

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor};
use candle_fp8_transformers::{ModelConfig, stock};
use candle_transformers::models::llama::{Cache, Config, Llama};
use clap::ValueEnum;

use super::measure::Subject;
use super::random::RandomWeights;
use super::shape::Shape;

/// Decode steps of a peer at most: it is not the one in a hurry.
pub(crate) const STEPS: usize = 8;

/// Whom to compare with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Peer {
    /// candle-transformers' own Llama, dense in BF16
    Candle,
}

impl Peer {
    /// The name on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Candle => "candle",
        }
    }

    /// Errs if the peer has no such model.
    pub(crate) fn check(self, shape: Shape) -> Result<()> {
        ensure!(
            stock::llama_config(&shape.config(1)?).is_ok(),
            "--peer {}: it is measured on Llama shapes, and {} is none",
            self.name(),
            shape.name()
        );
        Ok(())
    }
}

/// A stock Llama of random dense weights in BF16.
pub(crate) struct StockLlama {
    llama: Llama,
    config: Config,
    device: Device,
}

impl StockLlama {
    /// The dtype of its weights, activations and cache.
    pub(crate) const DTYPE: DType = DType::BF16;

    pub(crate) fn new(
        config: &ModelConfig,
        weights: &RandomWeights,
        device: &Device,
    ) -> Result<Self> {
        let config = stock::llama_config(config)?;
        let vb = weights.var_builder(Self::DTYPE, device);
        Ok(Self {
            llama: Llama::load(vb, &config)?,
            config,
            device: device.clone(),
        })
    }
}

impl Subject for StockLlama {
    /// Keys and values, and how many positions they are.
    type Cache = (Cache, usize);

    fn cache(&self, _: usize, _: usize) -> Result<Self::Cache> {
        let cache = Cache::new(true, Self::DTYPE, &self.config, &self.device)?;
        Ok((cache, 0))
    }

    fn reset(&self, cache: &mut Self::Cache) -> Result<()> {
        *cache = self.cache(0, 0)?;
        Ok(())
    }

    fn forward(&self, ids: &Tensor, (cache, len): &mut Self::Cache) -> Result<Tensor> {
        let logits = self.llama.forward(ids, *len, cache)?;
        *len += ids.dim(1)?;
        Ok(logits)
    }

    fn vocab_size(&self) -> usize {
        self.config.vocab_size
    }

    fn device(&self) -> &Device {
        &self.device
    }
}
