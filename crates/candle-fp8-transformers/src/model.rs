//! The language model: embedding, decoder layers, final norm, logits.

use candle_compressed_tensors::{CtDenseLinear, CtLinear, LinearSource, State, StateTensor};
use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::{Embedding, Module, VarBuilder};

use crate::layer::DecoderLayer;
use crate::norm::Norm;
use crate::profile::{Part, Profile, Timer};
use crate::rope::RotaryEmbedding;
#[cfg(feature = "cuda")]
use crate::step::{Given, Kept, Parts, Step};
use crate::{Error, KvCache, ModelConfig, Result};

/// Where checkpoints keep the decoder: text models first, then the multimodal ones.
const DECODER_PREFIXES: [&str; 4] = [
    "model",
    "language_model.model",
    "model.language_model",
    "model.language_model.model",
];

/// Where checkpoints keep the output projection.
const HEAD_PREFIXES: [&str; 3] = [
    "lm_head",
    "language_model.lm_head",
    "model.language_model.lm_head",
];

/// A decoder-only language model whose linears come from a [`LinearSource`]: in FP8 where the
/// checkpoint has them in FP8.
///
/// Runs in F32, BF16 or F16: the dtype of the `VarBuilder` is that of the norms, the activations and
/// the KV cache. The embedding and dense linears are held in the dtype that the source calls
/// [resident](LinearSource::resident_dtype): for a checkpoint on the CPU, BF16 where it stores BF16.
/// Softmax and norms are computed in f32. Inference only: the fused norms, RoPE and softmax it calls
/// have no backward pass.
#[derive(Debug)]
pub struct CausalLm {
    /// `[V, H]` in its resident dtype. Rows become activations, in `dtype`, when they are looked up.
    embed_tokens: Embedding,
    layers: Vec<DecoderLayer>,
    norm: Norm,
    head: Head,
    rotary: RotaryEmbedding,
    config: ModelConfig,
    /// Prefix of the decoder in the checkpoint, for example `model`.
    prefix: String,
    dtype: DType,
    device: Device,
    /// Tells this model from others.
    #[cfg(feature = "cuda")]
    id: std::sync::Arc<()>,
}

/// What turns hidden states into logits.
#[derive(Debug)]
pub(crate) enum Head {
    /// The embedding matrix: a linear that shares its storage.
    Tied(CtDenseLinear),
    Own {
        linear: CtLinear,
        prefix: String,
    },
}

impl Head {
    /// Weight `[V, H]` and bias of a dense one.
    #[cfg(feature = "cuda")]
    pub(crate) fn dense(&self) -> Option<(&Tensor, Option<&Tensor>)> {
        let linear = match self {
            Self::Tied(linear) => linear,
            Self::Own {
                linear: CtLinear::Dense(linear),
                ..
            } => linear,
            Self::Own { .. } => return None,
        };
        Some((linear.weight(), linear.bias()))
    }
}

impl CausalLm {
    /// Builds the model from the tensors under `vb`, which stands at the root of the checkpoint.
    ///
    /// Module names are those of the checkpoint (`model.layers.0.self_attn.q_proj`, `lm_head`, …);
    /// a multimodal checkpoint's prefix is found by looking where `embed_tokens.weight` is. Where
    /// `self_attn.k_scale` and `v_scale` exist, keys and values pass through E4M3 on their way into
    /// the cache. Experts are read stacked, as `….experts.gate_up_proj` `[E, 2I, H]` (gate first)
    /// and `….experts.down_proj` `[E, H, I]`.
    ///
    /// Logits use the embedding matrix when the config says so, or when it says nothing and there is
    /// no `lm_head.weight`. An `lm_head.weight` that differs from the embedding is used although the
    /// config calls them tied, as transformers does since version 5.
    ///
    /// # Errors
    /// A tensor is missing or has another shape, or KV scales are incomplete.
    pub fn load(config: &ModelConfig, source: &dyn LinearSource, vb: VarBuilder) -> Result<Self> {
        let has = |prefix: &&str, tensor: &str| vb.contains_tensor(&format!("{prefix}.{tensor}"));
        // Where nothing is found, the usual name makes the better error.
        let mut prefixes = DECODER_PREFIXES.into_iter();
        let prefix = prefixes
            .find(|prefix| has(prefix, "embed_tokens.weight"))
            .unwrap_or("model");
        let head = HEAD_PREFIXES
            .into_iter()
            .find(|prefix| has(prefix, "weight"));

        let vb_model = vb.pp(prefix);
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let embeddings = {
            let (vb, name) = (vb_model.pp("embed_tokens"), "weight");
            let dtype = source.resident_dtype(&vb, name);
            vb.get_with_hints_dtype((vocab, hidden), name, Default::default(), dtype)?
        };
        let repeated = |head: &str| {
            let shape = Shape::from((vocab, hidden));
            let [embedding, head] =
                [&format!("{prefix}.embed_tokens"), head].map(|module| format!("{module}.weight"));
            source.same_values(&vb, &shape, &embedding, &head)
        };
        let own_head = |prefix: &str| -> Result<Head> {
            Ok(Head::Own {
                linear: source.linear_b(hidden, vocab, false, vb.pp(prefix))?,
                prefix: prefix.to_string(),
            })
        };
        let head = match (config.tie_word_embeddings, head) {
            (Some(true), Some(prefix)) if !repeated(prefix)? => own_head(prefix)?,
            (Some(true), _) | (None, None) => {
                Head::Tied(CtDenseLinear::new(embeddings.clone(), None)?)
            }
            (Some(false) | None, Some(prefix)) => own_head(prefix)?,
            (Some(false), None) => own_head(HEAD_PREFIXES[0])?,
        };

        let vb_layers = vb_model.pp("layers");
        let layers = (0..config.num_hidden_layers)
            .map(|i| DecoderLayer::load(config, i, source, vb_layers.pp(i)))
            .collect::<Result<_>>()?;
        Ok(Self {
            embed_tokens: Embedding::new(embeddings, hidden),
            layers,
            norm: Norm::load(hidden, config.rms_norm_eps, vb_model.pp("norm"))?,
            head,
            rotary: RotaryEmbedding::new(&config.rope, config.head_dim),
            config: config.clone(),
            prefix: vb_model.prefix(),
            dtype: vb.dtype(),
            device: vb.device().clone(),
            #[cfg(feature = "cuda")]
            id: Default::default(),
        })
    }

    /// Logits `[B, V]` in F32 of the last of the positions `ids [B, L]` (U32), which follow those
    /// already in `cache` and are added to it.
    ///
    /// All sequences of a batch have the same length; there is no padding.
    ///
    /// On CUDA, steps of one token (L = 1) of a dense model whose layers' linears are all FP8 are a list of kernel
    /// launches, which the cache keeps with the memory that it works in, and replays as a CUDA graph from the second
    /// step on. It also keeps the model's weights, until the cache or another model's step with it ends that.
    ///
    /// # Errors
    /// [`Error::CacheFull`] when the positions do not fit, [`Error::Mismatch`] when ids, cache and
    /// model do not belong together, [`Error::OutOfMemory`] when the device has no memory left for
    /// what is between layers, [`Error::Candle`] for a token id outside the vocabulary, on the CPU. After any of them
    /// the model is usable, and the cache holds what it held before.
    ///
    /// Ids on a GPU are the caller's to check: where one is outside the vocabulary, a replayed step's logits of its
    /// sequence are NaN; elsewhere Candle's embedding stops the kernel, and with it the process's use of that GPU.
    /// [`forward_greedy`](Self::forward_greedy) and [`TextGeneration`](crate::TextGeneration) check theirs.
    pub fn forward(&self, ids: &Tensor, cache: &mut KvCache) -> Result<Tensor> {
        self.forward_timed(ids, cache, Timer::OFF)
    }

    /// [`forward`](Self::forward), and adds to `profile` how long each part of it took. Always op by op: of a step that
    /// is replayed as a graph, no part can be timed.
    ///
    /// # Errors
    /// Those of [`forward`](Self::forward).
    pub fn forward_profiled(
        &self,
        ids: &Tensor,
        cache: &mut KvCache,
        profile: &Profile,
    ) -> Result<Tensor> {
        self.forward_timed(ids, cache, Timer::new(profile))
    }

    /// Logits `[B, L, V]` in F32 of every position of `ids [B, L]`, else as
    /// [`forward`](Self::forward).
    ///
    /// # Errors
    /// Those of [`forward`](Self::forward).
    pub fn forward_all(&self, ids: &Tensor, cache: &mut KvCache) -> Result<Tensor> {
        self.whole(ids, cache, |cache| {
            #[cfg(feature = "cuda")]
            if let Some(logits) = self.stepped(ids, cache, Timer::OFF)? {
                return Ok(logits.unsqueeze(1)?);
            }
            let hidden = self.hidden(ids, cache, Timer::OFF)?;
            self.logits(&hidden)
        })
    }

    /// An empty cache that fits this model: its layers, dtype and device.
    ///
    /// # Errors
    /// Those of [`KvCache::new`].
    pub fn new_cache(&self, batch: usize, max_seq: usize) -> Result<KvCache> {
        KvCache::new(&self.config, batch, max_seq, self.dtype, &self.device)
    }

    /// The configuration that the model was built from.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Dtype of the activations.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where the model lives.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Every linear under its module name, in the order of the forward pass. A tied output
    /// projection and the experts, which are stacked, are not among them.
    pub fn linears(&self) -> impl Iterator<Item = (String, &CtLinear)> {
        let head = match &self.head {
            Head::Tied(_) => None,
            Head::Own { linear, prefix } => Some((prefix.clone(), linear)),
        };
        self.layers
            .iter()
            .flat_map(DecoderLayer::linears)
            .chain(head)
    }

    /// Every tensor of the model under its name in the checkpoint, for saving. Shares storage with
    /// the model. Experts are under their stacked names; a tied `lm_head.weight` is left out.
    pub fn state(&self) -> State {
        let mut state = State::new();
        state.tensor(
            format!("{}.embed_tokens.weight", self.prefix),
            self.embed_tokens.embeddings(),
        );
        for (name, linear) in self.linears() {
            state.linear(&name, linear);
        }
        for layer in &self.layers {
            layer.add_to(&mut state);
        }
        let (name, weight) = self.norm.weight();
        state.tensor(name, weight);
        state
    }

    /// Bytes of all tensors of the model, scales included.
    pub fn weight_bytes(&self) -> usize {
        let state = self.state();
        let tensors = state.names().filter_map(|name| state.get(name));
        tensors.map(StateTensor::bytes).sum()
    }

    fn forward_timed(&self, ids: &Tensor, cache: &mut KvCache, timer: Timer<'_>) -> Result<Tensor> {
        self.whole(ids, cache, |cache| {
            #[cfg(feature = "cuda")]
            if let Some(logits) = self.stepped(ids, cache, timer)? {
                return Ok(logits);
            }
            let hidden = self.hidden(ids, cache, timer)?;
            let last = hidden.dim(1)? - 1;
            let last = hidden.narrow(1, last, 1)?.squeeze(1)?.contiguous()?;
            let logits = timer.time(Part::LmHead, || self.logits(&last))?;
            timer.end()?;
            Ok(logits)
        })
    }

    /// Runs a forward pass of `ids` to its end, or leaves the cache with the positions that it had.
    fn whole(
        &self,
        ids: &Tensor,
        cache: &mut KvCache,
        forward: impl FnOnce(&mut KvCache) -> Result<Tensor> + Send,
    ) -> Result<Tensor> {
        let before = cache.len();
        let result = self.on_device(|| forward(&mut *cache));
        result.map_err(|error| {
            cache.truncate(before);
            error.during(&self.device, || {
                format!("a forward pass of {:?} token ids", ids.dims())
            })
        })
    }

    /// Runs a forward pass where its ops start fastest: on the CPU that is one of the threads that they share.
    fn on_device<T: Send>(&self, forward: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        match self.device.is_cpu() {
            true => candle_fp8::in_pool(forward),
            false => forward(),
        }
    }

    /// Final hidden states `[B, L, H]`, after the last norm.
    fn hidden(&self, ids: &Tensor, cache: &mut KvCache, timer: Timer<'_>) -> Result<Tensor> {
        let len = self.check(ids.dims(), cache)?;
        let (cos, sin) = timer.time(Part::Positions, || {
            cache.cos_sin(&self.rotary, len, self.dtype, &self.device)
        })?;
        let mut stream = timer.time(Part::Embedding, || {
            self.embed_tokens.forward(ids)?.to_dtype(self.dtype)
        })?;
        // What the last layer adds to the stream: added together with the next norm.
        let mut update = None;
        for layer in &self.layers {
            let next;
            (stream, next) = layer.forward(stream, update, (&cos, &sin), cache, timer)?;
            update = Some(next);
        }
        cache.advance(len);
        let (_, normed) = timer.time(Part::Norms, || {
            self.norm.forward_added(stream, update, None)
        })?;
        Ok(normed.values()?.clone())
    }

    /// The length L of ids `[B, L]` that a cache has room for.
    pub(crate) fn check(&self, ids: &[usize], cache: &KvCache) -> Result<usize> {
        let (batch, len) = match *ids {
            [batch, len] if batch > 0 && len > 0 => (batch, len),
            _ => {
                return Err(Error::Mismatch {
                    what: "shape of the token ids",
                    expected: "[B, L] with B and L at least 1".to_string(),
                    found: format!("{ids:?}"),
                });
            }
        };
        cache.check(batch, len, &self.config, self.dtype, &self.device)?;
        Ok(len)
    }

    /// As [`check`](Self::check), of ids that are still on the host: a GPU would not come back from one outside the
    /// vocabulary.
    pub(crate) fn check_tokens(
        &self,
        dims: [usize; 2],
        tokens: &[u32],
        cache: &KvCache,
    ) -> Result<()> {
        self.check(&dims, cache)?;
        let vocab = self.config.vocab_size;
        match tokens.iter().find(|token| **token as usize >= vocab) {
            None => Ok(()),
            Some(token) => Err(Error::Mismatch {
                what: "a token id",
                expected: format!("less than {vocab}"),
                found: token.to_string(),
            }),
        }
    }

    /// Logits `[B, V]` in F32 after one token of each sequence, by the launches that the cache keeps. `None` where
    /// there are none, or if ids are not `[B, 1]`, or parts are to be timed.
    #[cfg(feature = "cuda")]
    fn stepped(
        &self,
        ids: &Tensor,
        cache: &mut KvCache,
        timer: Timer<'_>,
    ) -> Result<Option<Tensor>> {
        if timer.is_on() || ids.rank() != 2 || ids.dim(1)? != 1 {
            return Ok(None);
        }
        self.check(ids.dims(), cache)?;
        let run = |step: &mut Step, position: usize| step.run(ids, position).map(Some);
        Ok(match self.step(cache, run)? {
            Some(Given::Normed(normed)) => Some(self.logits(&normed)?),
            // The next step writes them again: converted, or copied, they are the caller's.
            Some(Given::Logits(logits)) if logits.dtype() == DType::F32 => Some(logits.copy()?),
            Some(Given::Logits(logits)) => Some(logits.to_dtype(DType::F32)?),
            None => None,
        })
    }

    /// Runs the step of a cache that was checked, at the position after the filled ones, which it fills. `None` where
    /// there is no step, or `run` says so.
    #[cfg(feature = "cuda")]
    pub(crate) fn step<T>(
        &self,
        cache: &mut KvCache,
        run: impl FnOnce(&mut Step, usize) -> candle_core::Result<Option<T>>,
    ) -> Result<Option<T>> {
        if !self.device.is_cuda() {
            return Ok(None);
        }
        let mut kept = match cache.step.take() {
            Some(kept) if std::sync::Arc::ptr_eq(&kept.id, &self.id) => kept,
            _ => {
                let parts = Parts {
                    embeddings: self.embed_tokens.embeddings(),
                    layers: &self.layers,
                    norm: &self.norm,
                    head: &self.head,
                    rotary: &self.rotary,
                    hidden_size: self.config.hidden_size,
                    dtype: self.dtype,
                    device: &self.device,
                };
                Kept {
                    id: self.id.clone(),
                    step: Step::new(&parts, cache)?,
                }
            }
        };
        let done = match &mut kept.step {
            Some(step) => run(step, cache.len()),
            None => Ok(None),
        };
        cache.step = Some(kept);
        let done = done?;
        if done.is_some() {
            cache.advance(1);
        }
        Ok(done)
    }

    fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let logits = match &self.head {
            Head::Tied(linear) => linear.forward(hidden)?,
            Head::Own { linear, .. } => linear.forward(hidden)?,
        };
        Ok(logits.to_dtype(DType::F32)?)
    }
}
