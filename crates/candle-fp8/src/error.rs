//! What an op can refuse, in one voice: the op, the tensor, what was expected, what was found.

use candle_core::{DType, Device, DeviceLocation, Shape, Tensor};

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("{op}: {tensor} has dtype {found:?}, expected {expected}")]
    DType {
        op: &'static str,
        tensor: &'static str,
        expected: &'static str,
        found: DType,
    },
    #[error("{op}: {tensor} has shape {found:?}, expected {expected}")]
    Shape {
        op: &'static str,
        tensor: &'static str,
        expected: String,
        found: Shape,
    },
    #[error("{op}: {tensor} is on {found:?}, expected it on {expected:?} as the other tensors")]
    Device {
        op: &'static str,
        tensor: &'static str,
        expected: DeviceLocation,
        found: DeviceLocation,
    },
    #[error("{op}: {tensor} is {found}, expected {expected}")]
    Value {
        op: &'static str,
        tensor: &'static str,
        expected: &'static str,
        found: String,
    },
    #[cfg(not(feature = "cuda"))]
    #[error(
        "{op}: not built for CUDA; build candle-fp8 with its feature `cuda`, or move the tensors to the CPU"
    )]
    NoCuda { op: &'static str },
    #[cfg(not(feature = "metal"))]
    #[error(
        "{op}: not built for Metal; build candle-fp8 with its feature `metal`, or move the tensors to the CPU"
    )]
    NoMetal { op: &'static str },
    #[cfg(feature = "metal")]
    #[error(
        "{op}: this GPU has no matrix units (Apple silicon has: M1 or newer, A14 or newer); load with dequantize = true"
    )]
    NoMatrices { op: &'static str },
    #[cfg(feature = "metal")]
    #[error("{op}: {source}")]
    Metal {
        op: &'static str,
        source: candle_core::MetalError,
    },
    #[error("{op}: for tensors on the CPU; other devices have Candle's own")]
    OnlyCpu { op: &'static str },
    #[cfg(feature = "cuda")]
    #[error(
        "{op}: a GPU of compute capability {major}.{minor} has no FP8 units (8.9 or newer is needed); load with \
         dequantize = true"
    )]
    TooOld {
        op: &'static str,
        major: i32,
        minor: i32,
    },
    #[cfg(feature = "cuda")]
    #[error("{op}: {source}")]
    Driver {
        op: &'static str,
        source: candle_kernels_fp8::cuda::Error,
    },
    #[error("{op}: FP8 linears are not trainable; load with dequantize = true")]
    NotTrainable { op: &'static str },
}

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        candle_core::Error::wrap(error)
    }
}

/// Refuses a tensor whose dtype is not one of those named.
pub(crate) fn dtype(
    op: &'static str,
    tensor: &'static str,
    found: DType,
    allowed: &[DType],
    expected: &'static str,
) -> Result<(), Error> {
    if allowed.contains(&found) {
        return Ok(());
    }
    Err(Error::DType {
        op,
        tensor,
        expected,
        found,
    })
}

/// Refuses a tensor that is not a float that activations can have.
pub(crate) fn float(op: &'static str, tensor: &'static str, found: DType) -> Result<(), Error> {
    dtype(
        op,
        tensor,
        found,
        &[DType::BF16, DType::F16, DType::F32],
        "BF16, F16 or F32",
    )
}

/// Refuses a tensor that does not hold codes.
pub(crate) fn codes(op: &'static str, tensor: &'static str, found: DType) -> Result<(), Error> {
    dtype(op, tensor, found, &[DType::F8E4M3], "F8E4M3")
}

/// Refuses a tensor that lies on another device.
pub(crate) fn device(
    op: &'static str,
    tensor: &'static str,
    found: &Tensor,
    expected: &Device,
) -> Result<(), Error> {
    if found.device().same_device(expected) {
        return Ok(());
    }
    Err(Error::Device {
        op,
        tensor,
        expected: expected.location(),
        found: found.device().location(),
    })
}

/// Refuses a tensor of another shape.
pub(crate) fn shape(
    op: &'static str,
    tensor: &'static str,
    found: &Tensor,
    expected: &[usize],
    meaning: &str,
) -> Result<(), Error> {
    if found.dims() == expected {
        return Ok(());
    }
    Err(Error::Shape {
        op,
        tensor,
        expected: format!("{expected:?} ({meaning})"),
        found: found.shape().clone(),
    })
}

/// Says that a tensor's dimensions are others than expected.
pub(crate) fn dims(
    op: &'static str,
    tensor: &'static str,
    found: &Tensor,
    expected: &str,
) -> Error {
    Error::Shape {
        op,
        tensor,
        expected: expected.to_string(),
        found: found.shape().clone(),
    }
}

/// Four dimensions, none of them 0; `expected` names them.
pub(crate) fn dims4(
    op: &'static str,
    tensor: &'static str,
    found: &Tensor,
    expected: &str,
) -> Result<(usize, usize, usize, usize), Error> {
    match *found.dims() {
        [a, b, c, d] if a * b * c * d > 0 => Ok((a, b, c, d)),
        _ => Err(dims(op, tensor, found, expected)),
    }
}

/// Refuses a tensor that is not of the shape, dtype and device of another, `x`.
pub(crate) fn same(
    op: &'static str,
    tensor: &'static str,
    found: &Tensor,
    x: &Tensor,
) -> Result<(), Error> {
    shape(op, tensor, found, x.dims(), "as its counterpart")?;
    if found.dtype() != x.dtype() {
        return Err(Error::Value {
            op,
            tensor,
            expected: "of the dtype of its counterpart",
            found: format!("{:?}, not {:?}", found.dtype(), x.dtype()),
        });
    }
    device(op, tensor, found, x.device())
}

/// The sizes of a weight `[N, K]`, neither of them 0.
pub(crate) fn weight_dims(
    op: &'static str,
    tensor: &'static str,
    found: &Tensor,
) -> Result<(usize, usize), Error> {
    match *found.dims() {
        [n, k] if n > 0 && k > 0 => Ok((n, k)),
        _ => Err(Error::Shape {
            op,
            tensor,
            expected: "[N, K], neither of them 0".to_string(),
            found: found.shape().clone(),
        }),
    }
}

/// Refuses a weight that its kernel would have to copy.
pub(crate) fn contiguous(op: &'static str, weight: &Tensor) -> Result<(), Error> {
    if weight.is_contiguous() {
        return Ok(());
    }
    Err(Error::Value {
        op,
        tensor: "weight",
        expected: "contiguous [N, K], because a copy would double its memory",
        found: format!("strided {:?}", weight.stride()),
    })
}

/// The rows and columns of activations `[.., K]`, K not 0.
pub(crate) fn rows(
    op: &'static str,
    tensor: &'static str,
    found: &Tensor,
) -> Result<(usize, usize), Error> {
    match *found.dims() {
        [ref leading @ .., k] if k > 0 => Ok((leading.iter().product(), k)),
        _ => Err(Error::Shape {
            op,
            tensor,
            expected: "[.., K], K not 0".to_string(),
            found: found.shape().clone(),
        }),
    }
}

/// Refuses scales that do not fit the weight, and a layout that fits none.
pub(crate) fn weight_scale(
    op: &'static str,
    found: &Tensor,
    layout: candle_kernels_fp8::ScaleLayout,
    n: usize,
    k: usize,
) -> Result<(), Error> {
    use candle_kernels_fp8::ScaleLayout;
    block(op, layout)?;
    let meaning = match layout {
        ScaleLayout::Tensor => format!("one scale for the whole weight [{n}, {k}]"),
        ScaleLayout::Channel => format!("one scale for each row of the weight [{n}, {k}]"),
        ScaleLayout::Block { rows, cols } => {
            format!("one scale for each {rows}x{cols} block of the weight [{n}, {k}]")
        }
    };
    shape(op, "weight_scale", found, &layout.shape(n, k), &meaning)
}

/// Refuses a slice of another length.
pub(crate) fn length(
    op: &'static str,
    tensor: &'static str,
    found: usize,
    expected: usize,
) -> Result<(), Error> {
    if found == expected {
        return Ok(());
    }
    Err(Error::Shape {
        op,
        tensor,
        expected: format!("{expected} elements"),
        found: Shape::from(found),
    })
}

/// Refuses blocks of nothing.
pub(crate) fn block(
    op: &'static str,
    layout: candle_kernels_fp8::ScaleLayout,
) -> Result<(), Error> {
    if let candle_kernels_fp8::ScaleLayout::Block { rows, cols } = layout
        && (rows == 0 || cols == 0)
    {
        return Err(Error::Value {
            op,
            tensor: "block structure",
            expected: "at least 1x1",
            found: format!("{rows}x{cols}"),
        });
    }
    Ok(())
}

/// Refuses a group of nothing.
pub(crate) fn group(op: &'static str, size: usize) -> Result<(), Error> {
    if size > 0 {
        return Ok(());
    }
    Err(Error::Value {
        op,
        tensor: "group size",
        expected: "at least 1",
        found: "0".to_string(),
    })
}

/// Refuses what nothing can be quantized with; `name` is that of a given scale.
pub(crate) fn quantization(
    op: &'static str,
    name: &'static str,
    quantization: crate::Quantization,
) -> Result<(), Error> {
    match quantization {
        crate::Quantization::Static(value) => scale(op, name, value),
        crate::Quantization::PerGroup(size) => group(op, size),
        crate::Quantization::PerToken | crate::Quantization::PerTensor => Ok(()),
    }
}

/// Refuses a given scale that nothing can be divided by.
pub(crate) fn scale(op: &'static str, tensor: &'static str, scale: f32) -> Result<(), Error> {
    if scale.is_finite() && scale > 0.0 {
        return Ok(());
    }
    Err(Error::Value {
        op,
        tensor,
        expected: "a positive, finite scale",
        found: scale.to_string(),
    })
}

/// What an op says of a tensor on a device that it has no kernel for.
pub(crate) fn no_kernel(op: &'static str, tensor: &Tensor) -> Error {
    match tensor.device() {
        #[cfg(not(feature = "cuda"))]
        Device::Cuda(_) => Error::NoCuda { op },
        #[cfg(not(feature = "metal"))]
        Device::Metal(_) => Error::NoMetal { op },
        _ => Error::OnlyCpu { op },
    }
}
