//! Weights whose rows start where kernels read them at once.

use candle_core::{Result, Tensor};

use crate::{error, storage};

const OP: &str = "pad_weight";
/// Bytes that rows start at multiples of.
const PIECE: usize = 16;

/// A weight that [`scaled_mm`](crate::scaled_mm) on CUDA takes without making a copy of it in each call.
///
/// `weight`: F8E4M3 `[N, K]`, contiguous. Gives the weight itself where K is a multiple of 16; else a copy, in which rows
/// are K rounded up to a multiple of 16 apart, with zeros between them: a view of `[N, K]`, which the ops take as they
/// take the weight. On the CPU it helps nobody: there, a padded weight is copied in each call.
///
/// # Errors
/// If the weight is not as said above, or on a [device](crate#devices) without kernels.
pub fn pad_weight(weight: &Tensor) -> Result<Tensor> {
    error::codes(OP, "weight", weight.dtype())?;
    let (n, k) = error::weight_dims(OP, "weight", weight)?;
    error::contiguous_or_padded(OP, weight)?;
    if k.is_multiple_of(PIECE) || !weight.is_contiguous() {
        return Ok(weight.clone());
    }
    padded(weight, (n, k))?.narrow(1, 0, k)
}

/// `[N, K]`, K rounded up.
fn padded(weight: &Tensor, (n, k): (usize, usize)) -> Result<Tensor> {
    let stride = k.next_multiple_of(PIECE);
    #[cfg(feature = "cuda")]
    if weight.device().is_cuda() {
        use crate::cuda::{On, Rows, on_cuda, tensor};
        let (storage, layout) = weight.storage_and_layout();
        let storage = on_cuda(&storage)?;
        let on = On::new(OP, &storage.device);
        let copy = Rows::of(&on, (storage, layout))?.padded(&on)?;
        return Ok(tensor(copy, (n, stride)));
    }
    storage::on_cpu(OP, weight, |storage, layout| {
        let codes = storage::codes(storage, layout)?;
        let mut copy = vec![0u8; n * stride];
        for (to, from) in copy.chunks_exact_mut(stride).zip(codes.chunks_exact(k)) {
            to[..k].copy_from_slice(from);
        }
        Ok(storage::tensor(storage::from_codes(copy), (n, stride)))
    })
}
