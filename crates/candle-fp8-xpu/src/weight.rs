//! FP8 weights on a device.

use std::fmt;

use candle_core::{DType, Result, Tensor};

use crate::memory::Allocation;
use crate::rows::{PIECE, check_sizes, float, refused};
use crate::{Element, XpuDevice};

const OP: &str = "XpuWeight::new";

/// An FP8 weight with its scales and bias, uploaded once.
pub struct XpuWeight {
    pub(crate) device: XpuDevice,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) stride: usize,
    pub(crate) codes: Allocation,
    pub(crate) scales: Allocation,
    /// Rows that share a scale.
    pub(crate) scale_rows: usize,
    /// Scales of a row of blocks; 0 where there is one scale for all.
    pub(crate) scale_row: usize,
    /// Neighbours in a row that share a scale.
    pub(crate) scale_run: usize,
    pub(crate) bias: Option<(Allocation, Element)>,
}

impl fmt::Debug for XpuWeight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "XpuWeight([{}, {}] on {})",
            self.n,
            self.k,
            self.device.info().name
        )
    }
}

impl XpuWeight {
    /// Uploads a weight. All tensors are on the CPU, with any strides; N and K are below 2^31.
    ///
    /// - `codes`: F8E4M3 `[N, K]`;
    /// - `scale`: F32 `[1]` for all, `[N, 1]` for each row, or with `block` `[ceil(N / rows), ceil(K / cols)]`;
    /// - `block`: rows and columns that share a scale, not 0;
    /// - `bias`: BF16, F16 or F32 `[N]`.
    ///
    /// It takes N · K bytes on the device, K rounded up to a multiple of 16. Where the device reads tensors where
    /// they lie ([`Memory::Tensors`](crate::Memory::Tensors)) and K is such a multiple, it takes none, and keeps the
    /// tensor.
    ///
    /// # Errors
    /// If a tensor is not as said, or the device has too little memory.
    pub fn new(
        device: &XpuDevice,
        codes: &Tensor,
        scale: &Tensor,
        block: Option<(usize, usize)>,
        bias: Option<&Tensor>,
    ) -> Result<Self> {
        let (n, k) = match *codes.dims() {
            [n, k]
                if n > 0 && k > 0 && codes.dtype() == DType::F8E4M3 && codes.device().is_cpu() =>
            {
                (n, k)
            }
            _ => {
                return Err(refused(
                    OP,
                    "weight",
                    "F8E4M3 [N, K] on the CPU, neither of them 0",
                    codes,
                ));
            }
        };
        check_sizes(OP, "weight", codes, [n, k])?;
        let (shape, scale_rows, scale_row, scale_run) = match block {
            Some((rows, cols)) if rows > 0 && cols > 0 => {
                let across = k.div_ceil(cols);
                (vec![n.div_ceil(rows), across], rows, across, cols)
            }
            Some(_) => return Err(refused(OP, "weight", "in blocks of at least 1x1", codes)),
            None if scale.dims() == [1] => (vec![1], n, 0, k),
            None => (vec![n, 1], 1, 1, k),
        };
        if scale.dims() != shape || scale.dtype() != DType::F32 || !scale.device().is_cpu() {
            return Err(refused(
                OP,
                "weight_scale",
                format!("F32 {shape:?} on the CPU"),
                scale,
            ));
        }
        let stride = k.next_multiple_of(PIECE);
        let bias = match bias {
            Some(bias) if bias.dims() != [n] => {
                return Err(refused(OP, "bias", format!("of shape [{n}]"), bias));
            }
            Some(bias) => {
                let element = float(OP, "bias", bias)?;
                Some((Allocation::of_tensor(device, bias, n, n)?, element))
            }
            None => None,
        };
        let count = scale.elem_count();
        Ok(Self {
            device: device.clone(),
            n,
            k,
            stride,
            codes: Allocation::of_tensor(device, codes, k, stride)?,
            scales: Allocation::of_tensor(device, scale, count, count)?,
            scale_rows: scale_rows.min(n),
            scale_row,
            scale_run: scale_run.min(k),
            bias,
        })
    }

    /// The codes, F8E4M3 `[N, K]` on the CPU: a copy, but where the device reads the tensor that it was made of.
    ///
    /// # Errors
    /// If the device fails.
    pub fn codes(&self) -> Result<Tensor> {
        let rows = (self.codes).to_tensor(&[self.n, self.stride], DType::F8E4M3)?;
        match self.stride == self.k {
            true => Ok(rows),
            false => rows.narrow(1, 0, self.k)?.contiguous(),
        }
    }

    /// Bytes of memory that the codes take: on the device, or where it reads them.
    pub fn bytes(&self) -> usize {
        self.n * self.stride
    }

    /// The sizes `(N, K)`.
    pub fn dims(&self) -> (usize, usize) {
        (self.n, self.k)
    }

    /// Where it is.
    pub fn device(&self) -> &XpuDevice {
        &self.device
    }
}
