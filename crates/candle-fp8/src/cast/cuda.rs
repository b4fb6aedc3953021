//! Casts on NVIDIA GPUs.

use candle_core::{DType, Result, Tensor};
use candle_kernels_fp8::cuda as kernels;

use super::OP;
use crate::cuda::{On, Rows, float, on_cuda, tensor, writes};

/// From or to F8E4M3.
pub(super) fn cast(x: &Tensor, dtype: DType) -> Result<Tensor> {
    let (storage, layout) = x.storage_and_layout();
    let storage = on_cuda(&storage)?;
    let on = On::new(OP, &storage.device);
    let from = Rows::flat(&on, (storage, layout))?;
    let mut out = on.alloc(from.k, dtype)?;
    {
        let reads = from.reads(on.stream())?;
        let writes = writes(&mut out, on.stream())?;
        let (from, to, count) = (reads.address, writes.address, from.k);
        // SAFETY: both have so many elements, of these types, and live until they are freed in the stream's order.
        let result = unsafe {
            match dtype {
                DType::F8E4M3 => {
                    let values = (from, float(x.dtype())?);
                    kernels::cast_to_e4m3(on.stream(), values, to, count, false)
                }
                _ => {
                    let values = (to, float(dtype)?);
                    kernels::cast_from_e4m3(on.stream(), from, values, count, false)
                }
            }
        };
        on.launched(result)?;
    }
    Ok(tensor(out, x.shape()))
}
