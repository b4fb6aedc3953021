//! Rows of several tensors in one.

use candle_core::{Result, Tensor};

/// The rows of tensors `[.., K]` one after the other: `Tensor::cat` in the first dimension. Where they are on CUDA,
/// contiguous and not to be differentiated, at the speed of memory, for which Candle's kernel takes three times as long.
///
/// # Errors
/// Those of `Tensor::cat`: there is no tensor, or their dtypes, devices or other dimensions differ.
pub fn cat_rows(parts: &[Tensor]) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let [first, _, ..] = parts
        && crate::kernel::serves_cuda(&parts.iter().collect::<Vec<_>>())
        && parts.iter().all(|part| alike(part, first))
    {
        return cuda(first, parts);
    }
    Tensor::cat(parts, 0)
}

/// Whether they can be moved as they lie: not so without dimensions, or if Candle has an error for them.
#[cfg(feature = "cuda")]
fn alike(part: &Tensor, first: &Tensor) -> bool {
    part.rank() > 0
        && part.rank() == first.rank()
        && part.dims()[1..] == first.dims()[1..]
        && part.dtype() == first.dtype()
        && part.device().same_device(first.device())
        && part.is_contiguous()
}

#[cfg(feature = "cuda")]
fn cuda(first: &Tensor, parts: &[Tensor]) -> Result<Tensor> {
    use crate::cuda::{On, Rows, on_cuda, tensor, writes};

    let mut dims = first.dims().to_vec();
    dims[0] = parts.iter().map(|part| part.dims()[0]).sum();
    let (storage, _) = first.storage_and_layout();
    let on = On::new("cat_rows", &on_cuda(&storage)?.device);
    let mut out = on.alloc(dims.iter().product(), first.dtype())?;
    {
        let out = writes(&mut out, on.stream())?;
        let mut to = out.address;
        for part in parts {
            let bytes = part.elem_count() * part.dtype().size_in_bytes();
            let (storage, layout) = part.storage_and_layout();
            let rows = Rows::flat(&on, (on_cuda(&storage)?, layout))?;
            let from = rows.reads(on.stream())?;
            // SAFETY: both have so many bytes, and live until they are freed in the stream's order.
            unsafe { on.copy(from.address, to, bytes) }?;
            to += bytes as u64;
        }
    }
    Ok(tensor(out, dims))
}
