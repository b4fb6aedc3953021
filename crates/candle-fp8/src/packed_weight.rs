//! Weights in the order in which products read them.

use candle_core::{DType, Device, Result, Tensor};

use crate::error;

const OP: &str = "pack_weight";
/// Bytes that rows start at multiples of on Metal.
#[cfg(feature = "metal")]
const PIECE: usize = 16;

/// An FP8 weight `[N, K]` as the products of its device read it fastest. Cloning is cheap.
///
/// On CUDA that is an order of its own, with N rounded up to a multiple of 8 and K to one of 128. On Metal rows start
/// at multiples of 16 bytes. On the CPU it is the tensor as it was.
#[derive(Debug, Clone)]
pub struct PackedWeight {
    /// F8E4M3: `[N, K]`, with room between rows on Metal; on CUDA all bytes of the panels.
    codes: Tensor,
    n: usize,
    k: usize,
}

impl PackedWeight {
    /// Output and input features, `(N, K)`.
    pub fn dims(&self) -> (usize, usize) {
        (self.n, self.k)
    }

    /// Where it is.
    pub fn device(&self) -> &Device {
        self.codes.device()
    }

    /// Bytes of memory that it takes.
    pub fn bytes(&self) -> usize {
        // With the room between rows; panels are one row.
        let rows = self.codes.dims().first().zip(self.codes.stride().first());
        rows.map_or(0, |(rows, stride)| {
            rows * stride * DType::F8E4M3.size_in_bytes()
        })
    }

    /// Puts weights of the same K one behind the other, as one weight whose features are those of all: gives it, and
    /// the weights as parts of its memory, in their order. One product with it is a product with each of them.
    ///
    /// `None` where they cannot be joined: elsewhere than on CUDA (the CPU gains nothing by it), if K differs, or if N
    /// of one that another follows is no multiple of 8.
    ///
    /// # Errors
    /// If the device has no memory left for the copy.
    pub fn join(weights: &[&Self]) -> Result<Option<(Self, Vec<Self>)>> {
        let (Some(first), Some((_, before))) = (weights.first(), weights.split_last()) else {
            return Ok(None);
        };
        let like_first = |w: &Self| w.k == first.k && w.device().same_device(first.device());
        let on_cuda = first.device().is_cuda();
        // Panels of eight rows follow each other: those of the next weight go where there would be more of this one.
        let whole_panels = before.iter().all(|weight| weight.n.is_multiple_of(8));
        if !(on_cuda && whole_panels && weights.iter().all(|w| like_first(w))) {
            return Ok(None);
        }
        let codes: Vec<&Tensor> = weights.iter().map(|weight| &weight.codes).collect();
        let joined = Self {
            codes: Tensor::cat(&codes, 0)?,
            n: weights.iter().map(|weight| weight.n).sum(),
            k: first.k,
        };
        let mut start = 0;
        let mut part = |weight: &&Self| {
            let bytes = weight.codes.elem_count();
            let codes = joined.codes.narrow(0, start, bytes)?;
            start += bytes;
            Ok(Self { codes, ..**weight })
        };
        let parts = weights.iter().map(&mut part).collect::<Result<_>>()?;
        Ok(Some((joined, parts)))
    }

    /// The weight as it was: F8E4M3 `[N, K]`. A copy on CUDA; on Metal not contiguous where K is no multiple of 16.
    ///
    /// # Errors
    /// If the device has no memory left for the copy, or fails.
    pub fn unpack(&self) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if self.codes.device().is_cuda() {
            return cuda::unpack(&self.codes, (self.n, self.k));
        }
        Ok(self.codes.clone())
    }
}

/// A weight that [`scaled_mm`](crate::scaled_mm) is called with more than once.
///
/// `weight`: F8E4M3 `[N, K]`, contiguous. On CUDA its codes are copied, and the original can go.
///
/// # Errors
/// If the weight is not as said above, or on a GPU without [kernels](crate#devices).
pub fn pack_weight(weight: &Tensor) -> Result<PackedWeight> {
    error::codes(OP, "weight", weight.dtype())?;
    let (n, k) = error::weight_dims(OP, "weight", weight)?;
    error::contiguous(OP, weight)?;
    #[cfg(feature = "cuda")]
    if weight.device().is_cuda() {
        let codes = cuda::pack(weight, (n, k))?;
        return Ok(PackedWeight { codes, n, k });
    }
    #[cfg(feature = "metal")]
    if weight.device().is_metal() && !k.is_multiple_of(PIECE) {
        let codes = metal::padded(weight)?.narrow(1, 0, k)?;
        return Ok(PackedWeight { codes, n, k });
    }
    Ok(PackedWeight {
        codes: weight.clone(),
        n,
        k,
    })
}

/// The codes of a weight, as an op takes them.
#[derive(Debug, Clone, Copy)]
pub enum Codes<'a> {
    /// F8E4M3 `[N, K]`, contiguous.
    Rows(&'a Tensor),
    /// Packed once, which serves many products.
    Packed(&'a PackedWeight),
}

impl<'a> Codes<'a> {
    /// The tensor that holds them.
    pub(crate) fn tensor(self) -> &'a Tensor {
        match self {
            Self::Rows(tensor) => tensor,
            Self::Packed(weight) => &weight.codes,
        }
    }

    /// Whether they lie in an order of their own.
    pub(crate) fn in_panels(self) -> bool {
        matches!(self, Self::Packed(weight) if weight.codes.device().is_cuda())
    }
}

impl<'a> From<&'a Tensor> for Codes<'a> {
    fn from(tensor: &'a Tensor) -> Self {
        Self::Rows(tensor)
    }
}

impl<'a> From<&'a PackedWeight> for Codes<'a> {
    fn from(weight: &'a PackedWeight) -> Self {
        Self::Packed(weight)
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    use candle_core::{DType, Result, Tensor};
    use candle_kernels_fp8::cuda::{self as kernels, Panels};

    use super::OP;
    use crate::cuda::{On, Rows, on_cuda, tensor, writes};

    /// Codes `[N, K]` into panels, as a row of bytes.
    pub(super) fn pack(weight: &Tensor, (n, k): (usize, usize)) -> Result<Tensor> {
        let panels = Panels { n, k };
        let (storage, layout) = weight.storage_and_layout();
        let storage = on_cuda(&storage)?;
        let on = On::new(OP, &storage.device);
        let rows = Rows::of(&on, (storage, layout))?;
        let mut packed = on.alloc(panels.len(), DType::F8E4M3)?;
        {
            let from = rows.reads(on.stream())?;
            let to = writes(&mut packed, on.stream())?;
            let from = (from.address, rows.stride);
            // SAFETY: the weight has `n` rows that are so far apart, and there is room for its panels; both live until
            // they are freed in the stream's order.
            on.launched(unsafe { kernels::pack(on.stream(), from, to.address, panels, false) })?;
        }
        Ok(tensor(packed, panels.len()))
    }

    /// The opposite.
    pub(super) fn unpack(packed: &Tensor, (n, k): (usize, usize)) -> Result<Tensor> {
        let (storage, layout) = packed.storage_and_layout();
        let storage = on_cuda(&storage)?;
        let on = On::new("unpack", &storage.device);
        let panels = Rows::flat(&on, (storage, layout))?;
        let mut rows = on.alloc(n * k, DType::F8E4M3)?;
        {
            let from = panels.reads(on.stream())?;
            let to = writes(&mut rows, on.stream())?;
            let to = (to.address, k);
            // SAFETY: `pack` made the panels, and there is room for the rows; both live until they are freed in the
            // stream's order.
            on.launched(unsafe {
                kernels::unpack(on.stream(), from.address, to, Panels { n, k }, false)
            })?;
        }
        Ok(tensor(rows, (n, k)))
    }
}

#[cfg(feature = "metal")]
mod metal {
    use candle_core::backend::BackendStorage;
    use candle_core::{Result, Tensor};

    use super::{OP, PIECE};
    use crate::metal::{On, Rows, on_metal, tensor};

    /// Codes `[N, K]` in rows of so many bytes that each starts at a multiple of 16, zeros behind them.
    pub(super) fn padded(weight: &Tensor) -> Result<Tensor> {
        let (n, k) = weight.dims2()?;
        let (storage, layout) = weight.storage_and_layout();
        let storage = on_metal(&storage)?;
        let on = On::new(OP, storage.device());
        let copy = Rows::of(&on, (storage, layout))?.padded(&on)?;
        Ok(tensor(copy, (n, k.next_multiple_of(PIECE))))
    }
}
