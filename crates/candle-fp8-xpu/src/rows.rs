//! Activations on a device.

use candle_core::{Result, Tensor};

use crate::memory::{Allocation, bytes_for};
use crate::{Element, Error, XpuDevice};

/// Elements that rows start at multiples of: what kernels read at once.
pub(crate) const PIECE: usize = 16;

/// A matrix `[m, k]`, whose rows are `stride` elements apart.
pub(crate) struct Rows {
    pub(crate) memory: Allocation,
    pub(crate) m: usize,
    pub(crate) k: usize,
    pub(crate) stride: usize,
    pub(crate) element: Element,
}

impl Rows {
    /// Room for rows that a kernel computes, of which each starts at a multiple of [`PIECE`].
    pub(crate) fn new(device: &XpuDevice, m: usize, k: usize, element: Element) -> Result<Self> {
        let stride = k.next_multiple_of(PIECE);
        let memory = Allocation::new(device, bytes_for(&[m, stride], element.dtype()))?;
        Ok(Self {
            memory,
            m,
            k,
            stride,
            element,
        })
    }

    /// Room for rows that become a tensor.
    pub(crate) fn of_result(
        device: &XpuDevice,
        m: usize,
        k: usize,
        element: Element,
    ) -> Result<Self> {
        let memory = Allocation::of_result(device, &[m, k], element.dtype())?;
        Ok(Self {
            memory,
            m,
            k,
            stride: k,
            element,
        })
    }

    /// Those of a BF16, F16 or F32 tensor `[.., k]`.
    pub(crate) fn of(device: &XpuDevice, op: &'static str, x: &Tensor) -> Result<Self> {
        let (m, k) = dims(op, "x", x)?;
        let element = float(op, "x", x)?;
        let stride = k.next_multiple_of(PIECE);
        let memory = Allocation::of_tensor(device, x, k, stride)?;
        Ok(Self {
            memory,
            m,
            k,
            stride,
            element,
        })
    }

    /// [Those of a result](Self::of_result) as a tensor `[.., k]`.
    pub(crate) fn into_tensor(self, dims: &[usize]) -> Result<Tensor> {
        assert_eq!(self.stride, self.k, "rows are dense");
        self.memory.into_tensor(dims, self.element.dtype())
    }
}

/// What sizes of matrices are below: kernels count in 32 bits, and add two of them.
const SIZES: usize = 1 << 31;

/// The rows and columns of activations `[.., k]`, k not 0.
pub(crate) fn dims(op: &'static str, tensor: &'static str, x: &Tensor) -> Result<(usize, usize)> {
    match *x.dims() {
        [ref leading @ .., k] if k > 0 => {
            let m = leading.iter().product();
            check_sizes(op, tensor, x, [m, k])?;
            Ok((m, k))
        }
        _ => Err(refused(op, tensor, "of shape [.., K], K not 0", x)),
    }
}

/// Refuses a matrix that kernels cannot count the rows or columns of.
pub(crate) fn check_sizes(
    op: &'static str,
    tensor: &'static str,
    x: &Tensor,
    sizes: [usize; 2],
) -> Result<()> {
    match sizes.iter().all(|&size| size < SIZES) {
        true => Ok(()),
        false => Err(refused(
            op,
            tensor,
            format!("of rows and columns below {SIZES}"),
            x,
        )),
    }
}

/// The type of a float tensor on the CPU.
pub(crate) fn float(op: &'static str, tensor: &'static str, x: &Tensor) -> Result<Element> {
    match Element::float(x.dtype()) {
        Some(element) if x.device().is_cpu() => Ok(element),
        _ => Err(refused(op, tensor, "BF16, F16 or F32 on the CPU", x)),
    }
}

/// Says what a tensor should be.
pub(crate) fn refused(
    op: &'static str,
    tensor: &'static str,
    expected: impl Into<String>,
    found: &Tensor,
) -> candle_core::Error {
    let found = format!(
        "{:?} {:?} on {:?}",
        found.dtype(),
        found.dims(),
        found.device().location()
    );
    Error::Tensor {
        op,
        tensor,
        expected: expected.into(),
        found,
    }
    .into()
}
