//! One kernel for all of it, on NVIDIA GPUs.

use candle_core::{Result, Tensor};
use candle_kernels_fp8::cuda::{self as kernels, Address, Heads, Positions};

use super::{OP, RopeAppend, Sizes};
use crate::cuda::{Rows, float, in_place, on_cuda, tensor, writes};

pub(super) fn rope_append(
    args: &RopeAppend<'_>,
    sizes: Sizes,
    cache: &Tensor,
    position: usize,
) -> Result<Tensor> {
    let dtype = args.q.dtype();
    in_place(OP, cache, |on, cache| {
        let [q, k, v] = [args.q, args.k, args.v].map(Tensor::storage_and_layout);
        let q = Rows::of(on, (on_cuda(&q.0)?, q.1))?;
        let k = Rows::of(on, (on_cuda(&k.0)?, k.1))?;
        let v = Rows::of(on, (on_cuda(&v.0)?, v.1))?;
        let [cos, sin] = [args.cos, args.sin].map(Tensor::storage_and_layout);
        let cos = Rows::flat(on, (on_cuda(&cos.0)?, cos.1))?;
        let sin = Rows::flat(on, (on_cuda(&sin.0)?, sin.1))?;
        let norms = args.norms.map(|norms| {
            let weights = [norms.q, norms.k].map(Tensor::storage_and_layout);
            (weights, norms.eps as f32)
        });
        let norms = match &norms {
            Some(([q, k], eps)) => Some((
                Rows::flat(on, (on_cuda(&q.0)?, q.1))?,
                Rows::flat(on, (on_cuda(&k.0)?, k.1))?,
                *eps,
            )),
            None => None,
        };
        let mut q_out = on.alloc(sizes.batch * sizes.len * sizes.heads * sizes.dim, dtype)?;
        {
            let reads = [&q, &k, &v, &cos, &sin].map(|rows| rows.reads(on.stream()));
            let [q_in, k_in, v_in, cos, sin] = reads;
            let (q_in, k_in, v_in, cos, sin) = (q_in?, k_in?, v_in?, cos?, sin?);
            let norms = match &norms {
                Some((q, k, eps)) => Some((q.reads(on.stream())?, k.reads(on.stream())?, *eps)),
                None => None,
            };
            let out = writes(&mut q_out, on.stream())?;
            let half = sizes.batch * sizes.kv_heads * sizes.capacity * sizes.dim;
            let heads = |values| Heads {
                values,
                batch_stride: sizes.kv_heads * sizes.capacity * sizes.dim,
                head_stride: sizes.capacity * sizes.dim,
            };
            let launch = kernels::RopeAppend {
                batch: sizes.batch,
                len: sizes.len,
                heads: sizes.heads,
                kv_heads: sizes.kv_heads,
                dim: sizes.dim,
                positions: Positions::Known(position),
                capacity: sizes.capacity,
                float: float(dtype)?,
                q: q_in.address,
                q_stride: q.stride,
                k: k_in.address,
                k_stride: k.stride,
                v: v_in.address,
                v_stride: v.stride,
                norms: norms.as_ref().map(|(q, k, eps)| kernels::HeadNorms {
                    q_weight: q.address,
                    k_weight: k.address,
                    eps: *eps,
                }),
                cos: cos.address,
                sin: sin.address,
                first_angle: position,
                q_out: out.address,
                q_out_stride: sizes.heads * sizes.dim,
                keys: heads(cache),
                values: heads(cache + (half * dtype.size_in_bytes()) as Address),
                dependent: false,
            };
            // SAFETY: the shapes are checked; inputs are locked while the cache is, so they are no part of it; all
            // lives until it is freed in the stream's order.
            on.launched(unsafe { kernels::rope_append(on.stream(), &launch) })?;
        }
        let shape = (sizes.batch, sizes.len, sizes.heads, sizes.dim);
        Ok(tensor(q_out, shape))
    })
}
