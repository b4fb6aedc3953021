//! What is between the projections of queries, keys and values and attention.

#[cfg(feature = "cuda")]
mod cuda;

use candle_core::{Result, Tensor};

use crate::error::{self, Error};
#[cfg(feature = "cuda")]
use crate::kernel;

const OP: &str = "rope_append";
const CACHE: &str = "[2, B, Hkv, capacity, D], D even, none of them 0";

/// RMS norms of each head of queries and keys, as [`rms_norm`](crate::rms_norm).
#[derive(Debug, Clone, Copy)]
pub struct HeadNorms<'a> {
    /// Of queries: `[D]` in their dtype.
    pub q: &'a Tensor,
    /// Of keys: `[D]` in their dtype.
    pub k: &'a Tensor,
    /// Added to the mean of the squares.
    pub eps: f64,
}

/// What a layer's projections make of L new tokens of each sequence, on its way to attention.
#[derive(Debug, Clone, Copy)]
pub struct RopeAppend<'a> {
    /// BF16, F16 or F32 `[B, L, Hq · D]`, any strides.
    pub q: &'a Tensor,
    /// `[B, L, Hkv · D]` in the dtype of `q`, any strides.
    pub k: &'a Tensor,
    /// `[B, L, Hkv · D]` in the dtype of `q`, any strides.
    pub v: &'a Tensor,
    /// Norms before the rotation, where a model has them.
    pub norms: Option<HeadNorms<'a>>,
    /// Of the new positions: `[L, D / 2]` in the dtype of `q`.
    pub cos: &'a Tensor,
    /// As `cos`.
    pub sin: &'a Tensor,
}

/// Rotates queries and keys as [`rope`](crate::rope) does, after norms of their heads if there are any, and writes keys
/// and values to a cache, at positions `position .. position + L` of each sequence.
///
/// `cache`: `[2, B, Hkv, capacity, D]` in the dtype of `q`, contiguous: keys, then values. It is written in place.
///
/// Gives the queries, `[B, L, Hq, D]`. On CUDA one kernel does it all, and squares are added in another order than in
/// [`rms_norm`](crate::rms_norm); elsewhere ops follow each other. No gradient passes to the cache.
///
/// # Errors
/// If a dtype, shape or device is not as said above, or the positions do not fit the cache. Nothing is written then.
///
/// # Deadlocks
/// If one of the tensors in `args` is a view of `cache`.
pub fn rope_append(args: &RopeAppend<'_>, cache: &Tensor, position: usize) -> Result<Tensor> {
    let sizes = Sizes::check(args, cache, position)?;
    #[cfg(feature = "cuda")]
    if sizes.len > 0 && kernel::serves_cuda(&args.tensors()) {
        return cuda::rope_append(args, sizes, cache, position);
    }
    composed(args, sizes, cache, position)
}

#[derive(Debug, Clone, Copy)]
struct Sizes {
    batch: usize,
    len: usize,
    heads: usize,
    kv_heads: usize,
    #[cfg_attr(not(feature = "cuda"), expect(dead_code))]
    capacity: usize,
    dim: usize,
}

impl Sizes {
    fn check(args: &RopeAppend<'_>, cache: &Tensor, position: usize) -> Result<Self> {
        let &RopeAppend { q, k, v, .. } = args;
        error::float(OP, "q", q.dtype())?;
        let (batch, kv_heads, capacity, dim) = match *cache.dims() {
            [2, b, h, c, d] if b * h * c * d > 0 && d % 2 == 0 => (b, h, c, d),
            _ => return Err(error::dims(OP, "cache", cache, CACHE).into()),
        };
        let dtype = [q.dtype()];
        error::dtype(OP, "cache", cache.dtype(), &dtype, "the dtype of q")?;
        error::device(OP, "cache", cache, q.device())?;
        if !cache.is_contiguous() {
            return Err(Error::Value {
                op: OP,
                tensor: "cache",
                expected: "contiguous, as it is written in place",
                found: format!("strided {:?}", cache.stride()),
            }
            .into());
        }
        let (len, heads) = match *q.dims() {
            [b, len, n] if b == batch && n > 0 && n % (kv_heads * dim) == 0 => (len, n / dim),
            _ => {
                let expected = format!("[{batch}, L, Hq · {dim}], Hq a multiple of {kv_heads}");
                return Err(error::dims(OP, "q", q, &expected).into());
            }
        };
        for (name, x) in [("k", k), ("v", v)] {
            let expected = [batch, len, kv_heads * dim];
            error::shape(OP, name, x, &expected, "heads of each new token")?;
        }
        for (name, angles) in [("cos", args.cos), ("sin", args.sin)] {
            let expected = [len, dim / 2];
            error::shape(OP, name, angles, &expected, "one for each pair of a head")?;
        }
        if let Some(norms) = args.norms {
            for (name, weight) in [("norms.q", norms.q), ("norms.k", norms.k)] {
                error::shape(OP, name, weight, &[dim], "one for each element of a head")?;
            }
        }
        for x in args.tensors() {
            error::dtype(OP, "an input", x.dtype(), &dtype, "the dtype of q")?;
            error::device(OP, "an input", x, q.device())?;
        }
        if position.checked_add(len).is_none_or(|end| end > capacity) {
            return Err(Error::Value {
                op: OP,
                tensor: "position",
                expected: "so that all new positions fit the cache",
                found: format!("{position}, for {len} of {capacity}"),
            }
            .into());
        }
        Ok(Self {
            batch,
            len,
            heads,
            kv_heads,
            capacity,
            dim,
        })
    }
}

impl<'a> RopeAppend<'a> {
    fn tensors(&self) -> Vec<&'a Tensor> {
        let norms = self.norms.map(|norms| [norms.q, norms.k]);
        let inputs = [self.q, self.k, self.v, self.cos, self.sin];
        inputs
            .into_iter()
            .chain(norms.into_iter().flatten())
            .collect()
    }
}

fn composed(
    args: &RopeAppend<'_>,
    sizes: Sizes,
    cache: &Tensor,
    position: usize,
) -> Result<Tensor> {
    let heads = |x: &Tensor, heads| x.reshape((sizes.batch, sizes.len, heads, sizes.dim));
    let mut q = heads(args.q, sizes.heads)?;
    let mut k = heads(args.k, sizes.kv_heads)?;
    let v = heads(args.v, sizes.kv_heads)?;
    if sizes.len == 0 {
        return Ok(q);
    }
    if let Some(norms) = args.norms {
        q = crate::rms_norm(&q, norms.q, norms.eps)?;
        k = crate::rms_norm(&k, norms.k, norms.eps)?;
    }
    let q = crate::rope(&q, args.cos, args.sin)?;
    let k = crate::rope(&k, args.cos, args.sin)?;
    for (place, x) in [(0, k), (1, v)] {
        // [B, Hkv, L, D]
        let x = x.transpose(1, 2)?.contiguous()?.detach();
        cache.get(place)?.slice_set(&x, 2, position)?;
    }
    Ok(q)
}
