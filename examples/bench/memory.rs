//! Whether a model fits, before any of it is made.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Result, bail};
use candle_core::{DType, Device};
use candle_fp8_examples::units;
use candle_fp8_transformers::{CausalLm, ModelConfig};

use super::random::RandomWeights;
use super::shape::Shape;

/// Bytes that a benchmark needs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Need {
    /// Every tensor of the model.
    pub(crate) weights: u64,
    /// The largest KV cache.
    cache: u64,
    /// Activations and conversions; roughly.
    work: u64,
}

/// The largest of the runs that were asked for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Largest {
    /// Tokens of a forward pass.
    pub(crate) tokens: usize,
    /// Positions of all sequences in a cache.
    pub(crate) positions: usize,
    /// Positions of one sequence.
    pub(crate) context: usize,
    /// Sequences.
    pub(crate) batch: usize,
}

impl Need {
    /// Builds the model from tensors without memory and adds their sizes up.
    pub(crate) fn of(config: &ModelConfig, dtype: DType, cpu: bool, runs: Largest) -> Result<Self> {
        let bytes = Arc::new(AtomicU64::new(0));
        let counter = bytes.clone();
        let measure = RandomWeights::measure(move |made| {
            counter.fetch_add(made, Ordering::Relaxed);
        });
        CausalLm::load(config, &measure, measure.var_builder(dtype, &Device::Cpu))?;

        let expert_rows = config
            .moe
            .as_ref()
            .map_or(0, |moe| moe.num_experts_per_tok * 2 * config.hidden_size);
        // Half a dozen copies of the residual stream and four of the MLP's inner one, in F32 to be on the safe side …
        let token = 6 * config.hidden_size + 4 * config.intermediate_size + expert_rows;
        // … and the scores of a block of queries: as they are, masked, and after the softmax.
        let queries = runs.tokens.min(256 * runs.batch) as f64;
        let scores = 3. * config.num_attention_heads as f64 * queries * runs.context as f64;
        // Candle widens both sides of a half-precision product on the CPU; the output projection is the largest.
        let widened = match cpu && dtype != DType::F32 {
            true => config.vocab_size * config.hidden_size,
            false => 0,
        };
        let floats = runs.tokens as f64 * token as f64 + scores + widened as f64;
        let positions = runs.positions as f64;
        Ok(Self {
            weights: bytes.load(Ordering::Relaxed),
            // Casts from floats saturate.
            cache: (positions * config.kv_bytes_per_position(dtype) as f64) as u64,
            work: (4. * floats) as u64,
        })
    }

    fn total(&self) -> u64 {
        (self.weights.saturating_add(self.cache)).saturating_add(self.work)
    }
}

/// Errs if `layers` layers of `shape` do not fit into `available` bytes, and says how many would.
pub(crate) fn check(
    shape: Shape,
    layers: usize,
    dtype: DType,
    cpu: bool,
    runs: Largest,
    available: Option<u64>,
) -> Result<Need> {
    let need = |layers| Need::of(&shape.config(layers)?, dtype, cpu, runs);
    let asked = need(layers)?;
    let Some(available) = available.filter(|available| asked.total() > *available) else {
        return Ok(asked);
    };
    let mut fitting = None;
    for fewer in (1..layers).rev() {
        if need(fewer)?.total() <= available {
            fitting = Some(fewer);
            break;
        }
    }
    let gb = |bytes: u64| bytes as f64 / 1e9;
    let advice = match (fitting, dtype) {
        (Some(fewer), _) => format!("take --layers {fewer} or fewer"),
        (None, DType::F32) => {
            "not even one layer does: take --dtype bf16, shorter runs or smaller batches".into()
        }
        (None, _) => "not even one layer does: take shorter runs or smaller batches".into(),
    };
    let experts = match shape.config(1)?.moe {
        Some(_) => " (merged experts are dense)",
        None => "",
    };
    bail!(
        "{}, {} in {}: weights of {:.1} GB{experts}, a KV cache of {:.1} GB and about {:.1} GB to work in \
         do not fit into the {:.1} GB that are free; {advice}",
        shape.name(),
        units::plural(layers, "layer"),
        dtype.as_str(),
        gb(asked.weights),
        gb(asked.cache),
        gb(asked.work),
        gb(available),
    )
}

/// Free bytes on `device`, as far as the system says: on Linux, for the CPU.
pub(crate) fn available(device: &Device) -> Option<u64> {
    if !device.is_cpu() {
        return None;
    }
    let host = free_on_host(&std::fs::read_to_string("/proc/meminfo").ok()?);
    let group = free_in_group();
    host.into_iter().chain(group).min()
}

/// `MemAvailable` of `/proc/meminfo`.
fn free_on_host(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// What the control group (a container, say) may still take: its limit, less what it has, but for cached files.
fn free_in_group() -> Option<u64> {
    let read = |file: &str| std::fs::read_to_string(format!("/sys/fs/cgroup/{file}")).ok();
    let number = |text: String| text.trim().parse::<u64>().ok();
    let limit = number(read("memory.max")?)?;
    let used = number(read("memory.current")?)?;
    let cached = read("memory.stat")?
        .lines()
        .find_map(|line| line.strip_prefix("file ")?.trim().parse().ok())
        .unwrap_or(0u64);
    Some(limit.saturating_sub(used.saturating_sub(cached)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUNS: Largest = Largest {
        tokens: 512,
        positions: 8 * 192,
        context: 512,
        batch: 8,
    };

    #[test]
    fn shapes_have_the_published_sizes() {
        let weights = |shape: Shape, dtype| {
            let config = shape.config(shape.layers()).unwrap();
            Need::of(&config, dtype, true, RUNS).unwrap().weights as f64 / 1e9
        };
        // 0.973 B parameters in FP8 linears and 2 × 65.5 M in BF16 ones, and so on.
        for (shape, expected) in [
            (Shape::Llama1b, 1.2369),
            (Shape::Llama8b, 9.0867),
            (Shape::Qwen3Moe30b, 60.1597),
        ] {
            let found = weights(shape, DType::BF16);
            assert!((found / expected - 1.).abs() < 1e-4, "{shape:?}: {found}");
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_with_what_would() {
        let shape = Shape::Qwen3Moe30b;
        let check = |layers, available| {
            check(shape, layers, DType::BF16, true, RUNS, available).map_err(|e| e.to_string())
        };
        let error = check(48, Some(24_000_000_000)).unwrap_err();
        assert!(
            error.contains("qwen3-30b-a3b, 48 layers in bf16"),
            "{error}"
        );
        assert!(error.contains("24.0 GB that are free"), "{error}");
        let advised: usize = error
            .split("--layers ")
            .nth(1)
            .and_then(|rest| rest.split(' ').next()?.parse().ok())
            .expect(&error);
        assert!((10..20).contains(&advised), "{error}");
        check(advised, Some(24_000_000_000)).unwrap();
        check(advised + 1, Some(24_000_000_000)).unwrap_err();
        check(48, None).unwrap();
        let error = check(48, Some(1_000_000)).unwrap_err();
        assert!(error.contains("not even one layer"), "{error}");
    }

    #[test]
    fn free_memory_is_read_in_bytes() {
        let meminfo = "MemTotal:       24000000 kB\nMemAvailable:   20000000 kB\n";
        assert_eq!(free_on_host(meminfo), Some(20_480_000_000));
        assert_eq!(free_on_host("MemTotal: 1 kB\n"), None);
    }
}
