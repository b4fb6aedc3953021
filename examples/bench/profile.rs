//! The parts of a forward pass against the clock.

use std::time::{Duration, Instant};

use anyhow::Result;
use candle_fp8_transformers::{CausalLm, Part, Profile};
use serde::Serialize;

use super::measure::{self, Sampler};
use super::traffic::{Linears, Traffic};

/// Prompts that are profiled: enough for a mean.
const PROMPTS: usize = 3;

/// Where the time of one run goes.
#[derive(Debug, Serialize)]
pub(crate) struct Profiled {
    /// `prefill` or `decode`.
    pub(crate) run: &'static str,
    /// Sequences.
    pub(crate) batch: usize,
    /// Positions in the cache before the first step.
    pub(crate) context: usize,
    /// Tokens of a sequence in one forward pass.
    pub(crate) tokens: usize,
    /// A step from its token ids to the sampled tokens, in µs: the mean.
    pub(crate) step_us: f64,
    /// What it consists of; the last ones are `sampling` and `rest`.
    pub(crate) parts: Vec<PartTime>,
}

/// One part of a step.
#[derive(Debug, Serialize)]
pub(crate) struct PartTime {
    pub(crate) part: &'static str,
    /// The mean over the steps.
    pub(crate) us: f64,
    /// Of the step, in percent.
    pub(crate) percent: f64,
    /// What it reads of weights and cache in 10⁹ bytes a second, where that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) gb_s: Option<f64>,
    /// Multiplications and additions of linears, in 10⁹ a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) gflop_s: Option<f64>,
}

/// Prompts of `tokens` random tokens, each into an empty cache.
pub(crate) fn prefill(model: &CausalLm, tokens: usize) -> Result<Profiled> {
    let ids = measure::random_ids(model, 1, tokens)?;
    let mut cache = model.new_cache(1, tokens)?;
    model.forward(&ids, &mut cache)?;
    // Else the first part that is timed would wait for it.
    model.device().synchronize()?;
    let mut clock = Clock::new(model);
    for _ in 0..PROMPTS {
        cache.reset();
        clock.step(|profile| Ok(model.forward_profiled(&ids, &mut cache, profile)?))?;
    }
    clock.report("prefill", 1, 0, tokens)
}

/// `steps` greedy steps of `batch` sequences after `context` positions.
pub(crate) fn decode(
    model: &CausalLm,
    batch: usize,
    context: usize,
    steps: usize,
) -> Result<Profiled> {
    let mut cache = model.new_cache(batch, context + steps)?;
    let mut clock = Clock::new(model);
    let first = measure::fill_cache(model, batch, context, &mut cache, &mut clock.sampler)?;
    let mut next = first;
    for _ in 0..steps {
        next = clock.step(|profile| {
            let ids = measure::column(&next, model.device())?;
            Ok(model.forward_profiled(&ids, &mut cache, profile)?)
        })?;
    }
    clock.report("decode", batch, context, 1)
}

/// What the profiled steps of a run took.
struct Clock<'m> {
    model: &'m CausalLm,
    profile: Profile,
    sampler: Sampler,
    steps: usize,
    total: Duration,
    sampling: Duration,
}

impl<'m> Clock<'m> {
    fn new(model: &'m CausalLm) -> Self {
        Self {
            model,
            profile: Profile::new(model.device()),
            sampler: Sampler::default(),
            steps: 0,
            total: Duration::ZERO,
            sampling: Duration::ZERO,
        }
    }

    /// Times a forward pass and the sampling after it; gives the sampled tokens.
    fn step(
        &mut self,
        forward: impl FnOnce(&Profile) -> Result<candle_core::Tensor>,
    ) -> Result<Vec<u32>> {
        let start = Instant::now();
        let logits = forward(&self.profile)?;
        let forward_time = start.elapsed();
        let tokens = self.sampler.sample(&logits)?;
        let step_time = start.elapsed();
        self.total += step_time;
        self.sampling += step_time - forward_time;
        self.steps += 1;
        Ok(tokens)
    }

    /// The means. Linears of a step see `tokens` rows of each sequence, but the head, which sees one.
    fn report(
        self,
        run: &'static str,
        batch: usize,
        context: usize,
        tokens: usize,
    ) -> Result<Profiled> {
        self.sampler.check("while profiling")?;
        let mean = |time: Duration| time.as_secs_f64() * 1e6 / self.steps as f64;
        let step_us = mean(self.total);
        let time = |part, us: f64| PartTime {
            part,
            us,
            percent: 100. * us / step_us,
            gb_s: None,
            gflop_s: None,
        };
        let traffic = Traffic::of(self.model, batch);
        // A run's mean step, as its contexts grow by one each.
        let mean_context = context as f64 + (self.steps - 1) as f64 / 2.;
        let parts = Part::ALL.into_iter().filter_map(|part| {
            let us = mean(self.profile.time(part));
            // A part that this model does not have.
            if us == 0. {
                return None;
            }
            let mut row = time(part.name(), us);
            let linears = Linears::of(self.model, part);
            if linears.weights > 0. {
                let rows = match part {
                    Part::LmHead => batch,
                    _ => batch * tokens,
                };
                row.gb_s = Some(linears.bytes / us / 1e3);
                row.gflop_s = Some(2. * linears.weights * rows as f64 / us / 1e3);
            }
            if part == Part::Attention && run == "decode" {
                row.gb_s = Some(traffic.position_bytes() * (mean_context + 1.) / us / 1e3);
            }
            Some(row)
        });
        let mut parts: Vec<PartTime> = parts.collect();
        parts.push(time("sampling", mean(self.sampling)));
        let counted = self.profile.total() + self.sampling;
        parts.push(time("rest", mean(self.total.saturating_sub(counted))));
        Ok(Profiled {
            run,
            batch,
            context,
            tokens,
            step_us,
            parts,
        })
    }
}
