//! Whether a model fits, before any of it is made.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Result, bail};
use candle_core::{DType, Device};
use candle_fp8_examples::units;
use candle_fp8_transformers::CausalLm;

use super::machine;
use super::peer::{Peer, StockLlama};
use super::random::{LmHead, RandomWeights};
use super::shape::Shape;

/// What is going to be measured.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plan<'a> {
    pub(crate) shape: Shape,
    pub(crate) lm_head: LmHead,
    /// Of the activations.
    pub(crate) dtype: DType,
    /// Whether it runs on the CPU.
    pub(crate) cpu: bool,
    pub(crate) runs: Largest,
    /// Whose turn it is when our model has left the memory.
    pub(crate) peers: &'a [Peer],
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

/// Bytes that a model and its runs need.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Need {
    /// Every tensor of the model.
    pub(crate) weights: u64,
    /// The largest KV cache.
    cache: u64,
    /// Activations and conversions; roughly.
    work: u64,
}

impl Need {
    fn total(&self) -> u64 {
        (self.weights.saturating_add(self.cache)).saturating_add(self.work)
    }
}

/// Weights that are not made, and the bytes that they were asked to have.
pub(crate) fn measured() -> (RandomWeights, Arc<AtomicU64>) {
    let bytes = Arc::new(AtomicU64::new(0));
    let counter = bytes.clone();
    let weights = RandomWeights::measure(move |made| {
        counter.fetch_add(made, Ordering::Relaxed);
    });
    (weights, bytes)
}

impl Plan<'_> {
    /// Builds our model from tensors without memory and adds their sizes up.
    fn ours(&self, layers: usize, dequantized: bool) -> Result<Need> {
        let config = self.shape.config(layers)?;
        let (weights, bytes) = measured();
        let mut weights = weights.with_lm_head(self.lm_head);
        if dequantized {
            weights = weights.dequantized();
        }
        let vb = weights.var_builder(self.dtype, &Device::Cpu);
        CausalLm::load(&config, &weights, vb)?;

        let runs = self.runs;
        let expert_rows = config
            .moe
            .as_ref()
            .map_or(0, |moe| moe.num_experts_per_tok * 2 * config.hidden_size);
        // Half a dozen copies of the residual stream and four of the MLP's inner one, in F32 to be on the safe side …
        let token = 6 * config.hidden_size + 4 * config.intermediate_size + expert_rows;
        // … and, on the CPU, the scores of a block of queries: as they are, masked, and after the softmax.
        let queries = match self.cpu {
            true => runs.tokens.min(256 * runs.batch) as f64,
            false => 0.,
        };
        let scores = 3. * config.num_attention_heads as f64 * queries * runs.context as f64;
        let floats = runs.tokens as f64 * token as f64 + scores;
        // The machine's own ceilings are measured while the model is there, but does not run; and between steps.
        let (probe, pause) = match self.cpu {
            true => (machine::READ_BYTES, machine::PAUSE_BYTES),
            false => (0, 0),
        };
        let positions = runs.positions as f64;
        Ok(Need {
            weights: bytes.load(Ordering::Relaxed),
            // Casts from floats saturate.
            cache: (positions * config.kv_bytes_per_position(self.dtype) as f64) as u64,
            work: ((4. * floats) as u64 + pause).max(probe),
        })
    }

    /// The same of a peer.
    fn peers(&self, peer: Peer, layers: usize) -> Result<Need> {
        match peer {
            Peer::Dequantized => self.ours(layers, true),
            Peer::Candle => self.stock(layers),
        }
    }

    fn stock(&self, layers: usize) -> Result<Need> {
        let config = self.shape.config(layers)?;
        let (weights, bytes) = measured();
        StockLlama::new(&config, &weights, &Device::Cpu)?;

        let runs = self.runs;
        let token = 6 * config.hidden_size + 4 * config.intermediate_size;
        // All queries of a sequence at once.
        let (tokens, context) = (runs.tokens as f64, runs.context as f64);
        let scores = 3. * config.num_attention_heads as f64 * tokens * context;
        // Both sides of a half-precision product are widened; the output projection is the largest.
        let widened = config.vocab_size * config.hidden_size;
        let cache = config.kv_bytes_per_position(StockLlama::DTYPE) as f64;
        Ok(Need {
            weights: bytes.load(Ordering::Relaxed),
            cache: (runs.positions as f64 * cache) as u64,
            work: (4. * (tokens * token as f64 + scores + widened as f64)) as u64,
        })
    }

    /// Errs if `layers` layers do not fit into `available` bytes, and says how many would. A peer may need more than a
    /// GPU has: there it answers with an error, where a CPU's system would end the program.
    pub(crate) fn check(&self, layers: usize, available: Option<u64>) -> Result<Need> {
        let need = self.ours(layers, false)?;
        if let Some(available) = available {
            self.fit(layers, available, "", |layers| self.ours(layers, false))?;
            for &peer in self.peers.iter().filter(|_| self.cpu) {
                let whose = format!("--peer {}: ", peer.name());
                self.fit(layers, available, &whose, |layers| self.peers(peer, layers))?;
            }
        }
        Ok(need)
    }

    fn fit(
        &self,
        layers: usize,
        available: u64,
        whose: &str,
        need: impl Fn(usize) -> Result<Need>,
    ) -> Result<()> {
        let asked = need(layers)?;
        if asked.total() <= available {
            return Ok(());
        }
        let mut fitting = None;
        for fewer in (1..layers).rev() {
            if need(fewer)?.total() <= available {
                fitting = Some(fewer);
                break;
            }
        }
        let gb = |bytes: u64| bytes as f64 / 1e9;
        let advice = match (fitting, self.dtype) {
            (Some(fewer), _) => format!("take --layers {fewer} or fewer"),
            (None, DType::F32) => {
                "not even one layer does: take --dtype bf16, shorter runs or smaller batches".into()
            }
            (None, _) => "not even one layer does: take shorter runs or smaller batches".into(),
        };
        let experts = match self.shape.config(1)?.moe {
            Some(_) => " (merged experts are dense)",
            None => "",
        };
        bail!(
            "{whose}{}, {} in {}: weights of {:.1} GB{experts}, a KV cache of {:.1} GB and about {:.1} GB to work in \
             do not fit into the {:.1} GB that are free; {advice}",
            self.shape.name(),
            units::plural(layers, "layer"),
            self.dtype.as_str(),
            gb(asked.weights),
            gb(asked.cache),
            gb(asked.work),
            gb(available),
        )
    }
}

/// Free bytes on `device`, as far as the system says: on Linux for the CPU, and on CUDA.
pub(crate) fn available(device: &Device) -> Option<u64> {
    if !device.is_cpu() {
        let usage = candle_fp8::memory_usage(device).ok()?;
        return usage.map(|usage| usage.free());
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

    fn plan(shape: Shape, lm_head: LmHead) -> Plan<'static> {
        Plan {
            shape,
            lm_head,
            dtype: DType::BF16,
            cpu: true,
            runs: RUNS,
            peers: &[],
        }
    }

    #[test]
    fn shapes_have_the_published_sizes() {
        // 0.973 B parameters in FP8 linears and 2 × 65.5 M in BF16 ones, and so on.
        for (shape, lm_head, expected) in [
            (Shape::Llama1b, LmHead::Bf16, 1.2369),
            (Shape::Llama1b, LmHead::Fp8, 1.1715),
            (Shape::Llama8b, LmHead::Bf16, 9.0867),
            (Shape::Qwen3Moe30b, LmHead::Bf16, 60.1597),
        ] {
            let need = plan(shape, lm_head).ours(shape.layers(), false).unwrap();
            let found = need.weights as f64 / 1e9;
            assert!((found / expected - 1.).abs() < 1e-4, "{shape:?}: {found}");
        }
        // 1.10 B and 8.03 B parameters in two bytes each.
        for (shape, expected) in [(Shape::Llama1b, 2.2085), (Shape::Llama8b, 16.0605)] {
            for peer in [Peer::Candle, Peer::Dequantized] {
                let plan = plan(shape, LmHead::Bf16);
                let need = plan.peers(peer, shape.layers()).unwrap();
                let found = need.weights as f64 / 1e9;
                assert!((found / expected - 1.).abs() < 1e-4, "{shape:?}: {found}");
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_with_what_would() {
        let plan = plan(Shape::Qwen3Moe30b, LmHead::Bf16);
        let check = |layers, available| plan.check(layers, available).map_err(|e| e.to_string());
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
    fn a_peer_that_does_not_fit_is_named() {
        let mut plan = plan(Shape::Llama8b, LmHead::Bf16);
        let available = Some(12_000_000_000);
        plan.check(32, available).unwrap();
        for (peers, start) in [
            (&[Peer::Candle], "--peer candle: llama-8b"),
            (&[Peer::Dequantized], "--peer dequantized: llama-8b"),
        ] {
            plan.peers = peers;
            let error = plan.check(32, available).unwrap_err().to_string();
            assert!(error.starts_with(start), "{error}");
            plan.check(8, available).unwrap();
        }
        // A GPU says so itself.
        plan.cpu = false;
        plan.check(32, available).unwrap();
    }

    #[test]
    fn free_memory_is_read_in_bytes() {
        let meminfo = "MemTotal:       24000000 kB\nMemAvailable:   20000000 kB\n";
        assert_eq!(free_on_host(meminfo), Some(20_480_000_000));
        assert_eq!(free_on_host("MemTotal: 1 kB\n"), None);
    }
}
