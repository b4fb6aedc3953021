//! Preallocated keys and values of every layer.

use candle_core::{DType, Device, Tensor};

use crate::{Error, ModelConfig, Result};

/// Keys and values of the positions seen so far, for a batch of sequences of equal length.
///
/// Each layer owns two tensors `[B, Hkv, max_seq, D]`, allocated once; a forward pass writes the new
/// positions in place and reads views. A forward that fails leaves [`len`](KvCache::len) where it was.
///
/// Not `Clone`: two caches would share storage, and one would overwrite the other.
#[derive(Debug)]
pub struct KvCache {
    layers: Vec<LayerCache>,
    len: usize,
    batch: usize,
    max_seq: usize,
}

#[derive(Debug)]
struct LayerCache {
    /// `[B, Hkv, max_seq, D]`, after RoPE.
    keys: Tensor,
    /// `[B, Hkv, max_seq, D]`.
    values: Tensor,
}

impl KvCache {
    /// An empty cache for `batch` sequences of up to `max_seq` positions (prompt and generation
    /// together). `dtype` and `device` are the model's.
    ///
    /// # Errors
    /// [`Error::InvalidSetting`] when `batch` or `max_seq` is 0, or the tensors could not be
    /// addressed; else what the allocation says.
    pub fn new(
        config: &ModelConfig,
        batch: usize,
        max_seq: usize,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let shape = (batch, config.num_key_value_heads, max_seq, config.head_dim);
        let bytes = [shape.0, shape.1, shape.2, shape.3, dtype.size_in_bytes()]
            .into_iter()
            .try_fold(1usize, usize::checked_mul);
        if bytes.is_none_or(|bytes| bytes == 0 || bytes > isize::MAX as usize) {
            return Err(Error::InvalidSetting {
                key: "batch and max_seq",
                found: format!("{batch} and {max_seq}"),
                expected: "both at least 1, and a layer's keys addressable",
            });
        }
        let layer = || -> Result<LayerCache> {
            Ok(LayerCache {
                keys: Tensor::zeros(shape, dtype, device)?,
                values: Tensor::zeros(shape, dtype, device)?,
            })
        };
        Ok(Self {
            layers: (0..config.num_hidden_layers)
                .map(|_| layer())
                .collect::<Result<_>>()?,
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
        if let Some(LayerCache { keys, .. }) = self.layers.first() {
            if keys.dims4()? != expected {
                let (expected, found) = (format!("{expected:?}"), format!("{:?}", keys.dims()));
                return Err(mismatch(
                    "shape [B, Hkv, max_seq, D] of the KV cache",
                    expected,
                    found,
                ));
            }
            if keys.dtype() != dtype {
                let (expected, found) = (format!("{dtype:?}"), format!("{:?}", keys.dtype()));
                return Err(mismatch("dtype of the KV cache", expected, found));
            }
            if !keys.device().same_device(device) {
                let expected = format!("{:?}", device.location());
                let found = format!("{:?}", keys.device().location());
                return Err(mismatch("device of the KV cache", expected, found));
            }
        }
        Ok(())
    }

    /// Writes `keys` and `values` `[B, Hkv, new, D]` of layer `layer` after the filled positions and
    /// gives views `[B, Hkv, len + new, D]` of all. [`advance`](Self::advance) makes them count.
    pub(crate) fn append(
        &mut self,
        layer: usize,
        keys: &Tensor,
        values: &Tensor,
    ) -> candle_core::Result<(Tensor, Tensor)> {
        let cache = &self.layers[layer];
        let total = self.len + keys.dim(2)?;
        cache.keys.slice_set(&keys.contiguous()?, 2, self.len)?;
        cache.values.slice_set(&values.contiguous()?, 2, self.len)?;
        Ok((
            cache.keys.narrow(2, 0, total)?,
            cache.values.narrow(2, 0, total)?,
        ))
    }

    /// Counts `new` positions that every layer has appended.
    pub(crate) fn advance(&mut self, new: usize) {
        self.len += new;
    }
}
