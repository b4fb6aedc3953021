//! What a model takes of a GPU's memory.

use std::fmt;

use anyhow::Result;
use candle_core::Device;
use candle_fp8::MemoryUsage;
use candle_fp8_examples::units;
use candle_fp8_transformers::CausalLm;
use serde::Serialize;

/// Bytes of a GPU, by what they are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) struct DeviceMemory {
    /// Weights and scales, as the device holds them: padded, and none of them twice.
    weights: u64,
    /// Keys and values of a token of one sequence.
    kv_cache_per_token: u64,
    /// The longest prompt that was measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    prefill: Option<PrefillMemory>,
    /// What is not in tensors: the context, the code of kernels, other programs.
    outside: u64,
    /// What there is.
    total: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
struct PrefillMemory {
    tokens: usize,
    /// The most that tensors took beside weights and KV cache.
    work: u64,
}

/// Looks at a GPU's memory while prompts are measured.
pub(crate) struct Watch<'m> {
    device: &'m Device,
    memory: Option<DeviceMemory>,
}

impl<'m> Watch<'m> {
    /// When the model is there, and nothing else.
    pub(crate) fn start(model: &'m CausalLm) -> Result<Self> {
        let device = model.device();
        candle_fp8::release_freed_memory(device)?;
        let position = model.config().kv_bytes_per_position(model.dtype());
        let memory = candle_fp8::memory_usage(device)?.map(|usage| DeviceMemory {
            weights: usage.used,
            kv_cache_per_token: position as u64,
            prefill: None,
            outside: usage.outside,
            total: usage.total,
        });
        Ok(Self { device, memory })
    }

    /// Measures a prompt of `tokens` tokens, for which there is a cache of as many positions.
    pub(crate) fn prefill<T>(
        &mut self,
        tokens: usize,
        measure: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        candle_fp8::reset_peak_memory(self.device)?;
        let result = measure()?;
        if let (Some(memory), Some(usage)) =
            (&mut self.memory, candle_fp8::memory_usage(self.device)?)
        {
            memory.add(tokens, usage);
        }
        Ok(result)
    }

    /// What was seen.
    pub(crate) fn memory(self) -> Option<DeviceMemory> {
        self.memory
    }
}

impl DeviceMemory {
    fn add(&mut self, tokens: usize, usage: MemoryUsage) {
        let resident = self.weights + self.kv_cache_per_token * tokens as u64;
        let work = usage.peak.saturating_sub(resident);
        if self.prefill.is_none_or(|prefill| prefill.tokens <= tokens) {
            self.prefill = Some(PrefillMemory { tokens, work });
        }
        self.outside = self.outside.max(usage.outside);
    }
}

impl fmt::Display for DeviceMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "device memory: {} of weights and scales, {} of KV cache a token",
            units::bytes(self.weights),
            units::bytes(self.kv_cache_per_token)
        )?;
        if let Some(PrefillMemory { tokens, work }) = self.prefill {
            let work = units::bytes(work);
            write!(f, ", {work} to work in at a prefill of {tokens}")?;
        }
        write!(
            f,
            "; {} outside; {} in all",
            units::bytes(self.outside),
            units::bytes(self.total)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_what_the_longest_prompt_has_beside_weights_and_cache() {
        let mut memory = DeviceMemory {
            weights: 8 << 30,
            kv_cache_per_token: 128 << 10,
            prefill: None,
            outside: 500 << 20,
            total: 140 << 30,
        };
        let usage = |peak, outside| MemoryUsage {
            total: 140 << 30,
            used: 8 << 30,
            peak,
            outside,
        };
        memory.add(8192, usage(9728 << 20, 600 << 20));
        memory.add(512, usage(8300 << 20, 550 << 20));
        assert_eq!(
            memory.to_string(),
            "device memory: 8.0 GiB of weights and scales, 128.0 KiB of KV cache a token, 512.0 MiB to work in at a \
             prefill of 8192; 600.0 MiB outside; 140.0 GiB in all"
        );
    }
}
