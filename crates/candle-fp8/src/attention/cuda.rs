//! Attention on NVIDIA GPUs.

use candle_core::{DType, Device, Result, Tensor};
use candle_kernels_fp8::cuda::{self as kernels, Address, Gpu, Heads, Positions};

use super::{Cached, OP, Query};
use crate::cuda::{On, Rows, first, float, in_place, on_cuda, tensor, writes};

/// The largest head that there is a kernel for.
const MOST_DIMS: usize = 512;

/// Whether a kernel takes heads of this dimension, and scores scaled by this.
pub(crate) fn serves(dim: usize, scale: f64) -> bool {
    let scale = scale as f32;
    dim <= MOST_DIMS && scale.is_finite() && scale > 0.0
}

/// Zeros, as the kernels want them before the first call.
pub(super) fn scratch(device: &Device) -> Result<Option<Tensor>> {
    let Device::Cuda(cuda) = device else {
        return Ok(None);
    };
    let Ok(gpu) = Gpu::of(&cuda.cuda_stream()) else {
        return Ok(None);
    };
    Tensor::zeros(kernels::attention_scratch(gpu), DType::U8, device).map(Some)
}

/// Over the first T positions of keys and values, each a tensor of its own.
pub(super) fn attention(
    query: Query<'_>,
    keys: &Tensor,
    values: &Tensor,
    scratch: &Tensor,
) -> Result<Tensor> {
    let (keys, values) = (apart(keys)?, apart(values)?);
    let (_, kv_heads, total, _) = keys.dims4()?;
    let (k, v) = (keys.storage_and_layout(), values.storage_and_layout());
    let (k, v) = ((on_cuda(&k.0)?, k.1), (on_cuda(&v.0)?, v.1));
    let on = On::new(OP, &k.0.device);
    let (k_first, v_first) = (first(k, on.stream())?, first(v, on.stream())?);
    let heads = |values: Address, tensor: &Tensor| Heads {
        values,
        batch_stride: tensor.stride()[0],
        // Of one head, the stride may be anything.
        head_stride: match kv_heads {
            1 => total * query.dim,
            _ => tensor.stride()[1],
        },
    };
    let memory = Memory {
        keys: heads(k_first.address, &keys),
        values: heads(v_first.address, &values),
        kv_heads,
        capacity: total,
        position: total - query.len,
    };
    launch(query, memory, scratch)
}

/// Over the positions of a cache `[2, B, Hkv, capacity, D]`.
pub(super) fn cached(query: Query<'_>, cached: Cached<'_>, scratch: &Tensor) -> Result<Tensor> {
    let (cache, layout) = cached.cache.storage_and_layout();
    let cache = (on_cuda(&cache)?, layout);
    let &[_, batch, kv_heads, capacity, dim] = layout.dims() else {
        candle_core::bail!("{OP}: the cache has been checked to have five dimensions");
    };
    let on = On::new(OP, &cache.0.device);
    let keys = first(cache, on.stream())?;
    let half = batch * kv_heads * capacity * dim * cached.cache.dtype().size_in_bytes();
    let heads = |values| Heads {
        values,
        batch_stride: kv_heads * capacity * dim,
        head_stride: capacity * dim,
    };
    let memory = Memory {
        keys: heads(keys.address),
        values: heads(keys.address + half as Address),
        kv_heads,
        capacity,
        position: cached.position,
    };
    launch(query, memory, scratch)
}

/// Keys and values, in memory that is in use until after the launch.
struct Memory {
    keys: Heads,
    values: Heads,
    kv_heads: usize,
    capacity: usize,
    position: usize,
}

fn launch(query: Query<'_>, memory: Memory, scratch: &Tensor) -> Result<Tensor> {
    let (q, layout) = query.q.storage_and_layout();
    let q = on_cuda(&q)?;
    in_place(OP, scratch, |on, scratch| {
        let rows = Rows::of_heads(on, (q, layout))?;
        let (dtype, tokens) = (query.q.dtype(), query.heads * query.dim);
        let mut out = on.alloc(query.q.elem_count(), dtype)?;
        {
            let q = rows.reads(on.stream())?;
            let out = writes(&mut out, on.stream())?;
            let args = kernels::Attention {
                batch: query.batch,
                queries: query.len,
                heads: query.heads,
                kv_heads: memory.kv_heads,
                dim: query.dim,
                positions: Positions::Known(memory.position),
                capacity: memory.capacity,
                window: query.window,
                scale: query.scale as f32,
                float: float(dtype)?,
                q: q.address,
                q_stride: rows.stride,
                keys: memory.keys,
                values: memory.values,
                out: out.address,
                out_stride: tokens,
                scratch,
                dependent: false,
            };
            // SAFETY: the shapes are checked; the scratch was zero before its first use, and is of this device and so
            // of its stream; all lives until it is freed in the stream's order.
            on.launched(unsafe { kernels::attention(on.stream(), &args) })?;
        }
        Ok(tensor(out, query.q.shape()))
    })
}

/// Keys or values `[B, Hkv, T, D]` where they lie, or a copy if rows of a head do not follow each other, or heads
/// overlap.
fn apart(heads: &Tensor) -> Result<Tensor> {
    let (batch, kv_heads, total, dim) = heads.dims4()?;
    let stride = heads.stride();
    let dense = (dim == 1 || stride[3] == 1) && (total == 1 || stride[2] == dim);
    let heads_apart = kv_heads == 1 || stride[1] >= total * dim;
    let sequences_apart = batch == 1 || stride[0] >= total * dim;
    match dense && heads_apart && sequences_apart {
        true => Ok(heads.clone()),
        false => heads.force_contiguous(),
    }
}
