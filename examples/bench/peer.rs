//! The same shape without FP8, and on other people's code.

use std::sync::atomic::Ordering;

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor};
use candle_fp8_transformers::{ModelConfig, stock};
use candle_transformers::models::llama::{Cache, Config, Llama};
use clap::ValueEnum;

use super::measure::Subject;
use super::memory;
use super::random::RandomWeights;
use super::shape::Shape;

/// Decode steps of a peer on a CPU at most: it is not the one in a hurry.
const STEPS: usize = 8;

/// Whom to compare with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Peer {
    /// The same model with its linears dequantized
    Dequantized,
    /// candle-transformers' own Llama, dense in BF16
    Candle,
}

impl Peer {
    /// The name on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Dequantized => "dequantized",
            Self::Candle => "candle",
        }
    }

    /// Decode steps of a run of `steps`.
    pub(crate) fn steps(steps: usize, device: &Device) -> usize {
        match device.is_cpu() {
            true => steps.min(STEPS),
            false => steps,
        }
    }

    /// Errs if the peer has no such model.
    pub(crate) fn check(self, shape: Shape) -> Result<()> {
        ensure!(
            self != Self::Candle || stock::llama_config(&shape.config(1)?).is_ok(),
            "--peer {}: it is measured on Llama shapes, and {} is none",
            self.name(),
            shape.name()
        );
        Ok(())
    }
}

/// `None` if a device had no memory for it.
pub(crate) fn fitting<T>(result: Result<T>) -> Result<Option<T>> {
    let out_of_memory = |error: &anyhow::Error| {
        let ours = error.downcast_ref::<candle_fp8_transformers::Error>();
        let theirs = error.downcast_ref::<candle_core::Error>();
        matches!(
            ours,
            Some(candle_fp8_transformers::Error::OutOfMemory { .. })
        ) || match ours {
            Some(candle_fp8_transformers::Error::Candle(error)) => {
                candle_fp8::is_out_of_memory(error)
            }
            _ => theirs.is_some_and(candle_fp8::is_out_of_memory),
        }
    };
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if out_of_memory(&error) => Ok(None),
        Err(error) => Err(error),
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
        if let Some(usage) = candle_fp8::memory_usage(device)? {
            // Candle's loader panics where there is no memory for a layer.
            let (measured, bytes) = memory::measured();
            Llama::load(measured.var_builder(Self::DTYPE, &Device::Cpu), &config)?;
            if bytes.load(Ordering::Relaxed) > usage.free() {
                return Err(candle_fp8_transformers::Error::OutOfMemory {
                    what: "the weights".into(),
                    free: Some(usage.free()),
                }
                .into());
            }
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_does_not_fit_is_left_out() {
        let candle = |text: &str| candle_core::Error::Msg(text.into());
        let full = "DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")";
        assert_eq!(fitting(Ok(1)).unwrap(), Some(1));
        assert_eq!(fitting::<u8>(Err(candle(full).into())).unwrap(), None);
        let ours = candle_fp8_transformers::Error::from(candle(full));
        assert_eq!(fitting::<u8>(Err(ours.into())).unwrap(), None);
        let ours = candle_fp8_transformers::Error::OutOfMemory {
            what: "a KV cache".into(),
            free: None,
        };
        assert_eq!(fitting::<u8>(Err(ours.into())).unwrap(), None);
        fitting::<u8>(Err(candle("another").into())).unwrap_err();
    }
}
