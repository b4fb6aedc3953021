//! Causal attention over a KV cache.

#[cfg(feature = "cuda")]
mod cuda;
mod plan;

use candle_core::{D, DType, Device, Result, Tensor};
use candle_kernels_fp8::cpu::{self, Heads, InstructionSet};

use crate::error::{self, Error};
use crate::kernel::{self, Float, memory, on_float};
#[cfg(feature = "cuda")]
pub(crate) use cuda::serves as kernel_serves;
use plan::{AttentionPlan, QueryBlock};

const OP: &str = "attention";
const QUERIES: &str = "[B, L, Hq, D], none of them 0";
const KEYS: &str = "[B, Hkv, T, D], B and D as in q, Hkv a divisor of Hq, T at least L";
const CACHE: &str = "[2, B, Hkv, capacity, D], B and D as in q, Hkv a divisor of Hq";

/// Memory that attention on a device works in, from one call to the next: 2 MB on an H200, nothing on the CPU.
#[derive(Debug)]
pub struct AttentionScratch {
    /// U8, zero between calls.
    #[cfg_attr(not(feature = "cuda"), expect(dead_code))]
    memory: Option<Tensor>,
}

impl AttentionScratch {
    /// For calls on `device`.
    ///
    /// # Errors
    /// If the device has no memory left.
    pub fn new(device: &Device) -> Result<Self> {
        #[cfg(feature = "cuda")]
        let memory = cuda::scratch(device)?;
        #[cfg(not(feature = "cuda"))]
        let (memory, _) = (None, device);
        Ok(Self { memory })
    }
}

#[cfg(feature = "cuda")]
impl AttentionScratch {
    /// On a GPU.
    pub(crate) fn memory(&self) -> Option<&Tensor> {
        self.memory.as_ref()
    }
}

/// The queries of a call: `q [B, L, Hq, D]`.
#[cfg_attr(not(feature = "cuda"), expect(dead_code))]
#[derive(Clone, Copy)]
struct Query<'a> {
    q: &'a Tensor,
    batch: usize,
    len: usize,
    heads: usize,
    dim: usize,
    window: Option<usize>,
    scale: f64,
}

impl<'a> Query<'a> {
    fn check(q: &'a Tensor, window: Option<usize>, scale: f64) -> Result<Self> {
        error::float(OP, "q", q.dtype())?;
        let (batch, len, heads, dim) = error::dims4(OP, "q", q, QUERIES)?;
        if window == Some(0) {
            return Err(Error::Value {
                op: OP,
                tensor: "window",
                expected: "at least 1",
                found: "0".to_string(),
            }
            .into());
        }
        Ok(Self {
            q,
            batch,
            len,
            heads,
            dim,
            window,
            scale,
        })
    }
}

/// A cache that [`rope_append`](crate::rope_append) has written to.
#[derive(Debug, Clone, Copy)]
pub struct Cached<'a> {
    /// `[2, B, Hkv, capacity, D]`, contiguous: keys, then values.
    pub cache: &'a Tensor,
    /// Positions before those of the queries.
    pub position: usize,
}

/// [`attention`] over the first `position + L` positions of a cache, with memory to work in.
///
/// On CUDA, how the work is cut depends on the cache's capacity and not on the position, and so does the order of sums:
/// a token's result does not depend on who knows its position, the host or the device.
///
/// # Errors
/// If a dtype, shape or device is not as said, the positions do not fit the cache, or `window` is 0.
pub fn attention_cached(
    q: &Tensor,
    cached: Cached<'_>,
    window: Option<usize>,
    scale: f64,
    scratch: &AttentionScratch,
) -> Result<Tensor> {
    let query = Query::check(q, window, scale)?;
    let Cached { cache, position } = cached;
    let fits = match *cache.dims() {
        [2, b, h, capacity, d] => {
            let end = position.checked_add(query.len);
            (b, d) == (query.batch, query.dim)
                && h > 0
                && query.heads.is_multiple_of(h)
                && end.is_some_and(|end| end <= capacity)
        }
        _ => false,
    };
    if !fits || !cache.is_contiguous() {
        let expected = format!("{CACHE}, room for {} + L, contiguous", position);
        return Err(error::dims(OP, "cache", cache, &expected).into());
    }
    let dtype = [q.dtype()];
    error::dtype(OP, "cache", cache.dtype(), &dtype, "the dtype of q")?;
    error::device(OP, "cache", cache, q.device())?;
    #[cfg(feature = "cuda")]
    if let Some(memory) = &scratch.memory
        && kernel::serves_cuda(&[q, cache])
        && cuda::serves(query.dim, scale)
    {
        error::device(OP, "scratch", memory, q.device())?;
        return cuda::cached(query, cached, memory);
    }
    #[cfg(not(feature = "cuda"))]
    let _ = scratch;
    let view = |place| cache.get(place)?.narrow(2, 0, position + query.len);
    attention(q, &view(0)?, &view(1)?, window, scale)
}

/// `softmax(q · keysᵀ · scale) · values` over the keys that each query sees. All arithmetic is in f32; the result is
/// rounded once.
///
/// - `q`: BF16, F16 or F32 `[B, L, Hq, D]`, any strides, as a projection leaves it. Query l is at position `T - L + l` and
///   sees the keys up to there; with a `window` of w, only the last w of them;
/// - `keys`, `values`: `[B, Hkv, T, D]` in the dtype of `q`: views of a cache, which are read in place. Query head h reads
///   head `h / (Hq / Hkv)`.
///
/// Gives `[B, L, Hq, D]` in the dtype of `q`. On CUDA each call makes an [`AttentionScratch`] of its own;
/// [`attention_cached`] does not.
///
/// # Errors
/// If a dtype, shape or device is not as said above, or `window` is 0.
pub fn attention(
    q: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    window: Option<usize>,
    scale: f64,
) -> Result<Tensor> {
    let query = Query::check(q, window, scale)?;
    let Query {
        batch,
        len,
        heads,
        dim,
        ..
    } = query;
    let (b, kv_heads, total, d) = error::dims4(OP, "keys", keys, KEYS)?;
    if (b, d) != (batch, dim) || !heads.is_multiple_of(kv_heads) || total < len {
        return Err(error::dims(OP, "keys", keys, KEYS).into());
    }
    error::dtype(OP, "keys", keys.dtype(), &[q.dtype()], "the dtype of q")?;
    error::device(OP, "keys", keys, q.device())?;
    error::same(OP, "values", values, keys)?;
    #[cfg(feature = "cuda")]
    if kernel::serves_cuda(&[q, keys, values])
        && cuda::serves(dim, scale)
        && let Some(scratch) = cuda::scratch(q.device())?
    {
        return cuda::attention(query, keys, values, &scratch);
    }
    if !kernel::serves(&[q, keys, values]) {
        return composed(q, keys, values, window, scale);
    }
    let q = q.contiguous()?;
    let (keys, values) = (rows_in_order(keys)?, rows_in_order(values)?);
    fn run<T: Float>(
        [q, keys, values]: [&Tensor; 3],
        window: Option<usize>,
        scale: f64,
    ) -> Result<Tensor> {
        let (batch, queries, heads, dim) = q.dims4()?;
        let (kv_heads, total) = (keys.dim(1)?, keys.dim(2)?);
        let [q_memory, k_memory, v_memory] = [q, keys, values].map(memory);
        let q_values = q_memory.values::<T>()?;
        let args = cpu::Attention {
            batch,
            queries,
            keys: total,
            heads,
            kv_heads,
            dim,
            window,
            scale: scale as f32,
            q: q_values,
            k: heads_of(k_memory.values()?, keys),
            v: heads_of(v_memory.values()?, values),
        };
        let mut out = Vec::new();
        cpu::attention(InstructionSet::best(), &args, &mut out);
        Ok(kernel::tensor(out, q))
    }
    on_float!(OP, q.dtype(), T => run::<T>([&q, &keys, &values], window, scale))
}

/// The tensor, or a copy where the rows of a head `[T, D]` do not follow each other.
fn rows_in_order(heads: &Tensor) -> Result<Tensor> {
    let (total, dim) = (heads.dim(2)?, heads.dim(3)?);
    let stride = heads.stride();
    match (dim == 1 || stride[3] == 1) && (total == 1 || stride[2] == dim) {
        true => Ok(heads.clone()),
        false => heads.force_contiguous(),
    }
}

fn heads_of<'a, T>(values: &'a [T], heads: &Tensor) -> Heads<'a, T> {
    let stride = heads.stride();
    Heads {
        values,
        batch_stride: stride[0],
        head_stride: stride[1],
    }
}

fn composed(
    q: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    window: Option<usize>,
    scale: f64,
) -> Result<Tensor> {
    let (len, total) = (q.dim(1)?, keys.dim(2)?);
    // [B, Hq, L, D]
    let q = q.transpose(1, 2)?;
    let plan = AttentionPlan::new(total - len, len, window, q.device())?;
    let blocks = plan.blocks.iter();
    let blocks = blocks.map(|block| attend(&q, keys, values, block, scale));
    let blocks: Vec<Tensor> = blocks.collect::<Result<_>>()?;
    Tensor::cat(&blocks, 2)?.transpose(1, 2)
}

/// One block of queries of `q [B, Hq, L, D]` over `keys`, `values` `[B, Hkv, T, D]` → `[B, Hq, n, D]`. Heads that share
/// keys are stacked as rows of one product, so that keys and values are never repeated.
fn attend(
    q: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    block: &QueryBlock,
    scale: f64,
) -> Result<Tensor> {
    let (batch, heads, _, dim) = q.dims4()?;
    let (n, t, kv_heads) = (block.query_len, block.key_len, keys.dim(1)?);
    let dtype = q.dtype();
    let stacked = (batch, kv_heads, heads / kv_heads * n, dim);
    let q = q.narrow(2, block.query_start, n)?.contiguous()?;
    let wide = |heads: &Tensor| heads.narrow(2, block.key_start, t)?.to_dtype(DType::F32);
    let (keys, values) = (wide(keys)?, wide(values)?);

    let q = q.reshape(stacked)?.to_dtype(DType::F32)?;
    let scores = (q.matmul(&keys.t()?)? * scale)?;
    let scores = match &block.mask {
        None => scores,
        Some(mask) => scores
            .reshape((batch, heads, n, t))?
            .broadcast_add(mask)?
            .reshape((batch, kv_heads, heads / kv_heads * n, t))?,
    };
    let weights = scores
        .broadcast_sub(&scores.max_keepdim(D::Minus1)?)?
        .exp()?;
    let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
    let y = weights.matmul(&values)?.to_dtype(dtype)?;
    y.reshape((batch, heads, n, dim))
}
