//! Preallocated keys and values of every layer.

use candle_core::{DType, Device, Tensor};
use candle_fp8::{AttentionScratch, Cached, RopeAppend};

use crate::error::gib;
#[cfg(feature = "cuda")]
use crate::step::Kept;
use crate::{Error, ModelConfig, Result, RotaryEmbedding};

/// Keys and values of the positions seen so far, for a batch of sequences of equal length.
///
/// Each layer owns a tensor `[2, B, Hkv, max_seq, D]`, allocated once; a forward pass writes the new
/// positions in place and reads views. On CUDA there are also the angles of all positions, made by
/// the first forward pass, and what attention needs to work in. A forward that fails leaves [`len`](KvCache::len) where
/// it was.
///
/// Not `Clone`: two caches would share storage, and one would overwrite the other.
#[derive(Debug)]
pub struct KvCache {
    /// Of each layer, `[2, B, Hkv, max_seq, D]`: keys, after RoPE, then values.
    layers: Vec<Tensor>,
    angles: Option<Angles>,
    scratch: AttentionScratch,
    /// A step's launches, from the first step on.
    #[cfg(feature = "cuda")]
    pub(crate) step: Option<Kept>,
    len: usize,
    batch: usize,
    max_seq: usize,
}

/// cos and sin of every position that fits, on CUDA.
#[derive(Debug)]
struct Angles {
    rotary: RotaryEmbedding,
    /// `[max_seq, D / 2]`.
    cos: Tensor,
    /// `[max_seq, D / 2]`.
    sin: Tensor,
}

impl KvCache {
    /// An empty cache for `batch` sequences of up to `max_seq` positions (prompt and generation
    /// together). `dtype` and `device` are the model's.
    ///
    /// # Errors
    /// [`Error::InvalidSetting`] when `batch` or `max_seq` is 0, or the tensors could not be
    /// addressed; [`Error::OutOfMemory`] when the device has not so much memory.
    pub fn new(
        config: &ModelConfig,
        batch: usize,
        max_seq: usize,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let (heads, dim) = (config.num_key_value_heads, config.head_dim);
        let shape = (2, batch, heads, max_seq, dim);
        let bytes = [2, batch, heads, max_seq, dim, dtype.size_in_bytes()]
            .into_iter()
            .try_fold(1usize, usize::checked_mul);
        let bytes = bytes.filter(|&bytes| bytes > 0 && bytes <= isize::MAX as usize);
        let Some(bytes) = bytes else {
            return Err(Error::InvalidSetting {
                key: "batch and max_seq",
                found: format!("{batch} and {max_seq}"),
                expected: "both at least 1, and a layer's keys and values addressable",
            });
        };
        let what = || {
            let all = (bytes as u64).saturating_mul(config.num_hidden_layers as u64);
            format!("a KV cache of {batch} × {max_seq} positions ({})", gib(all))
        };
        // On the host, memory that is not there would end the program.
        if device.is_cpu() && Vec::<u8>::new().try_reserve_exact(bytes).is_err() {
            return Err(Error::OutOfMemory {
                what: what(),
                free: None,
            });
        }
        let make = || -> Result<(Vec<Tensor>, AttentionScratch)> {
            let layers = (0..config.num_hidden_layers).map(|_| Tensor::zeros(shape, dtype, device));
            let layers = layers.collect::<candle_core::Result<_>>()?;
            Ok((layers, AttentionScratch::new(device)?))
        };
        let (layers, scratch) = make().map_err(|error| error.during(device, what))?;
        Ok(Self {
            layers,
            angles: None,
            scratch,
            #[cfg(feature = "cuda")]
            step: None,
            len: 0,
            batch,
            max_seq,
        })
    }

    /// Positions filled so far.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no position is filled.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Positions that fit.
    pub fn max_seq(&self) -> usize {
        self.max_seq
    }

    /// Sequences in the batch.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Forgets every position. The memory stays allocated.
    pub fn reset(&mut self) {
        self.len = 0;
    }

    /// Keeps the first `len` positions, to continue from a shared prefix; more than are there is
    /// no change.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Checks that this cache belongs to a model and that `new` positions of `batch` sequences fit.
    pub(crate) fn check(
        &self,
        batch: usize,
        new: usize,
        config: &ModelConfig,
        dtype: DType,
        device: &Device,
    ) -> Result<()> {
        if self.len + new > self.max_seq {
            return Err(Error::CacheFull {
                used: self.len,
                new,
                max_seq: self.max_seq,
            });
        }
        let expected = (
            batch,
            config.num_key_value_heads,
            self.max_seq,
            config.head_dim,
        );
        let mismatch = |what, expected: String, found: String| Error::Mismatch {
            what,
            expected,
            found,
        };
        let (layers, needed) = (self.layers.len(), config.num_hidden_layers);
        if layers != needed {
            return Err(mismatch(
                "layers of the KV cache",
                needed.to_string(),
                layers.to_string(),
            ));
        }
        if let Some(layer) = self.layers.first() {
            let (_, b, heads, max_seq, dim) = layer.dims5()?;
            let found = (b, heads, max_seq, dim);
            if found != expected {
                let (expected, found) = (format!("{expected:?}"), format!("{found:?}"));
                return Err(mismatch(
                    "shape [B, Hkv, max_seq, D] of the KV cache",
                    expected,
                    found,
                ));
            }
            if layer.dtype() != dtype {
                let (expected, found) = (format!("{dtype:?}"), format!("{:?}", layer.dtype()));
                return Err(mismatch("dtype of the KV cache", expected, found));
            }
            if !layer.device().same_device(device) {
                let expected = format!("{:?}", device.location());
                let found = format!("{:?}", layer.device().location());
                return Err(mismatch("device of the KV cache", expected, found));
            }
        }
        Ok(())
    }

    /// cos and sin, `[new, D / 2]` each in the cache's dtype, of the positions after the filled ones.
    ///
    /// On CUDA they are views of a table, so that no forward pass waits for the host to compute and copy them.
    pub(crate) fn cos_sin(
        &mut self,
        rotary: &RotaryEmbedding,
        new: usize,
        dtype: DType,
        device: &Device,
    ) -> Result<(Tensor, Tensor)> {
        if !device.is_cuda() {
            return rotary.cos_sin(self.len, new, dtype, device);
        }
        let (cos, sin) = self.angles(rotary, dtype, device)?;
        let of_new = |table: &Tensor| table.narrow(0, self.len, new);
        Ok((of_new(&cos)?, of_new(&sin)?))
    }

    /// cos and sin, `[max_seq, D / 2]` each, of every position that fits. Kept.
    pub(crate) fn angles(
        &mut self,
        rotary: &RotaryEmbedding,
        dtype: DType,
        device: &Device,
    ) -> Result<(Tensor, Tensor)> {
        let angles = match self.angles.take() {
            Some(angles) if angles.rotary == *rotary => angles,
            _ => {
                let (cos, sin) = rotary.cos_sin(0, self.max_seq, dtype, device)?;
                let rotary = rotary.clone();
                Angles { rotary, cos, sin }
            }
        };
        let angles = self.angles.insert(angles);
        Ok((angles.cos.clone(), angles.sin.clone()))
    }

    /// A layer's `[2, B, Hkv, max_seq, D]`: keys, then values.
    #[cfg(feature = "cuda")]
    pub(crate) fn layer(&self, layer: usize) -> &Tensor {
        &self.layers[layer]
    }

    /// What attention works in.
    #[cfg(feature = "cuda")]
    pub(crate) fn scratch(&self) -> &AttentionScratch {
        &self.scratch
    }

    /// Rotates the queries and keys of new positions, and writes keys and values of layer `layer` after
    /// the filled positions: gives the queries `[B, new, Hq, D]`. [`advance`](Self::advance) makes the
    /// positions count.
    pub(crate) fn rope_append(
        &mut self,
        layer: usize,
        args: &RopeAppend<'_>,
    ) -> candle_core::Result<Tensor> {
        candle_fp8::rope_append(args, &self.layers[layer], self.len)
    }

    /// Writes `keys` and `values` `[B, Hkv, new, D]`, as [`rope_append`](Self::rope_append) does.
    pub(crate) fn append(
        &mut self,
        layer: usize,
        keys: &Tensor,
        values: &Tensor,
    ) -> candle_core::Result<()> {
        for (place, new) in [(0, keys), (1, values)] {
            let cache = self.layers[layer].get(place)?;
            cache.slice_set(&new.contiguous()?, 2, self.len)?;
        }
        Ok(())
    }

    /// Attention of queries `[B, new, Hq, D]` to the filled positions and those appended.
    pub(crate) fn attention(
        &self,
        layer: usize,
        q: &Tensor,
        window: Option<usize>,
        scale: f64,
    ) -> candle_core::Result<Tensor> {
        let cached = Cached {
            cache: &self.layers[layer],
            position: self.len,
        };
        candle_fp8::attention_cached(q, cached, window, scale, &self.scratch)
    }

    /// Counts `new` positions that every layer has appended.
    pub(crate) fn advance(&mut self, new: usize) {
        self.len += new;
    }
}
