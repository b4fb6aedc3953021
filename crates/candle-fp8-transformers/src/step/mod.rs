//! A decode step of a dense FP8 model on a GPU, as a fixed list of kernel launches.

mod record;

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};
use candle_fp8::{LaunchArgmax, Launches};

use crate::layer::DecoderLayer;
use crate::model::Head;
use crate::norm::Norm;
use crate::{Greedy, KvCache, RotaryEmbedding};
use record::Recorder;

/// One token of each sequence of a cache: embedding, all layers, the last norm and, where there is a launch for it, the
/// head; with the choice of the most probable tokens or without. Keeps the memory of both, cache and weights.
///
/// Ids and positions are on the device, where a choice leaves those of the step that follows it: a row of greedy steps
/// copies nothing there.
#[derive(Debug)]
pub(crate) struct Step {
    /// Up to what the step gives.
    plain: Launches,
    /// And the choice of tokens. `None` if the step gives no logits.
    greedy: Option<Launches>,
    /// U32 `[B + 1]`: ids, those of the next step after a choice; and whether a logit was not finite.
    words: Tensor,
    /// U32 `[B]`.
    positions: Tensor,
    /// Ids and position that a choice has left on the device.
    left: Option<(Vec<u32>, usize)>,
    given: Given,
}

/// What a step ends with, in memory that the next run writes again.
#[derive(Debug, Clone)]
pub(crate) enum Given {
    /// `[B, V]` in the model's dtype.
    Logits(Tensor),
    /// `[B, H]`, after the last norm: the head has no launch.
    Normed(Tensor),
}

/// What a step is made of.
pub(crate) struct Parts<'a> {
    pub(crate) embeddings: &'a Tensor,
    pub(crate) layers: &'a [DecoderLayer],
    pub(crate) norm: &'a Norm,
    pub(crate) head: &'a Head,
    pub(crate) rotary: &'a RotaryEmbedding,
    pub(crate) hidden_size: usize,
    pub(crate) dtype: DType,
    pub(crate) device: &'a Device,
}

impl Step {
    /// For a model and a cache. `None` if some of the layers' ops have no launch: dense linears, experts, caches that
    /// round to E4M3, one scale for all activations; or if the device has no kernels for FP8.
    pub(crate) fn new(parts: &Parts<'_>, cache: &mut KvCache) -> crate::Result<Option<Self>> {
        if !candle_fp8::fp8_kernels(parts.device) {
            return Ok(None);
        }
        let batch = cache.batch();
        let angles = cache.angles(parts.rotary, parts.dtype, parts.device)?;
        let words = Tensor::zeros(batch + 1, DType::U32, parts.device)?;
        let positions = Tensor::zeros(batch, DType::U32, parts.device)?;
        let recorder = Recorder::new(parts, cache, angles, &positions)?;
        let ids = words.narrow(0, 0, batch)?;
        let Some((plain, given)) = recorder.record(parts, &ids)? else {
            return Ok(None);
        };
        let greedy = match &given {
            Given::Normed(_) => None,
            Given::Logits(logits) => {
                let mut greedy = plain.fork();
                let to = LaunchArgmax {
                    ids: &ids,
                    positions: &positions,
                    not_finite: &words.narrow(0, batch, 1)?,
                };
                greedy.argmax(logits, to)?;
                Some(greedy)
            }
        };
        Ok(Some(Self {
            plain,
            greedy,
            words,
            positions,
            left: None,
            given,
        }))
    }

    /// Tokens `[B, 1]` at a position, without a choice.
    pub(crate) fn run(&mut self, ids: &Tensor, position: usize) -> Result<Given> {
        self.write(ids, position)?;
        self.plain.run()?;
        Ok(self.given.clone())
    }

    /// The tokens that are most probable after `tokens`, one of each sequence, at a position. `None`, and nothing is
    /// done, if the step gives no logits.
    pub(crate) fn choose(&mut self, tokens: &[u32], position: usize) -> Result<Option<Greedy>> {
        if self.greedy.is_none() {
            return Ok(None);
        }
        let there = |(ids, at): &(Vec<u32>, usize)| ids == tokens && *at == position;
        if !self.left.as_ref().is_some_and(there) {
            self.write(&Tensor::new(tokens, self.words.device())?, position)?;
        }
        // Not known any more if something fails.
        self.left = None;
        let Some(greedy) = &mut self.greedy else {
            return Ok(None);
        };
        greedy.run()?;
        let mut tokens = self.words.to_vec1::<u32>()?;
        let finite = tokens.pop() == Some(0);
        if !finite {
            let zero = Tensor::zeros(1, DType::U32, self.words.device())?;
            self.words.slice_set(&zero, 0, tokens.len())?;
        }
        self.left = Some((tokens.clone(), position + 1));
        Ok(Some(Greedy { tokens, finite }))
    }

    fn write(&mut self, ids: &Tensor, position: usize) -> Result<()> {
        self.left = None;
        let ids = ids.flatten_all()?.to_dtype(DType::U32)?.contiguous()?;
        self.words.slice_set(&ids, 0, 0)?;
        let batch = self.positions.dim(0)?;
        let positions = Tensor::full(position as u32, batch, self.words.device())?;
        self.positions.slice_set(&positions, 0, 0)
    }
}

/// What a cache keeps of the last model that made a step with it.
#[derive(Debug)]
pub(crate) struct Kept {
    /// Of the model.
    pub(crate) id: Arc<()>,
    /// None if the model's ops have no launches.
    pub(crate) step: Option<Step>,
}
