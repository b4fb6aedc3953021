//! Activations times FP8 weights.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "metal")]
mod metal;

use candle_core::{
    CpuStorage, CudaStorage, CustomOp3, DType, Layout, MetalStorage, Result, Shape, Tensor,
};
use candle_kernels_fp8::cpu::Scaling;

use crate::error::{self, Error};
use crate::{Codes, Quantization, ScaleLayout};

const OP: &str = "scaled_mm";

/// The activations of a [`scaled_mm`].
#[derive(Debug, Clone, Copy)]
pub enum Input<'a> {
    /// As they are (W8A16): BF16, F16 or F32 `[.., K]`.
    Full(&'a Tensor),
    /// BF16, F16 or F32 `[.., K]`, quantized inside the op (W8A8).
    Quantize(&'a Tensor, Quantization),
    /// Quantized already (W8A8).
    Codes {
        /// F8E4M3 `[.., K]`.
        codes: &'a Tensor,
        /// F32: `[1]` for all, `[.., 1]` for each row, or with `group` `[.., ceil(K / group)]`.
        scales: &'a Tensor,
        /// The number of neighbours in a row that share a scale, if it is not the whole row.
        group: Option<usize>,
        /// The result's dtype: BF16, F16 or F32.
        dtype: DType,
    },
}

/// `x · weightᵀ`, with scales, and a bias added.
///
/// - `input`: the activations `[.., K]`, any strides;
/// - `weight`: F8E4M3 `[N, K]`, contiguous, or a [`PackedWeight`](crate::PackedWeight), which GPUs read faster;
/// - `weight_scale`: F32, of the shape that `layout` says;
/// - `bias`: BF16, F16 or F32 `[N]`.
///
/// Gives `[.., N]` in the input's dtype; see the [arithmetic](crate#arithmetic). The weight is never expanded: the CPU
/// kernel decodes at most 4 × 1024 codes at a time in each thread, those of GPUs on their way to the matrix units. If
/// it is a tensor whose rows do not start at multiples of 16 bytes, each call on CUDA makes a copy of it, and Metal reads
/// it byte by byte.
///
/// # Errors
/// If a dtype, shape or device is not as said above, the weight is not contiguous, a static scale is not positive and
/// finite, or the tensors are on a [device](crate#devices) without kernels; and in a backward pass that reaches the op,
/// because FP8 linears are not trainable. A bias that gradients are tracked for is refused at once.
pub fn scaled_mm<'a>(
    input: Input<'_>,
    weight: impl Into<Codes<'a>>,
    weight_scale: &Tensor,
    layout: ScaleLayout,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    let weight = weight.into();
    let op = ScaledMm::check(input, weight, weight_scale, layout, bias)?;
    let (Input::Full(x) | Input::Quantize(x, _) | Input::Codes { codes: x, .. }) = input;
    x.apply_op3(weight.tensor(), weight_scale, op)
}

/// An FP8 weight with its scales and bias, as [`scaled_mm`] takes them one by one.
#[derive(Debug, Clone, Copy)]
pub struct Weight<'a> {
    /// F8E4M3 `[N, K]`.
    pub codes: Codes<'a>,
    /// F32, of the shape that `layout` says.
    pub scale: &'a Tensor,
    /// What one scale spans.
    pub layout: ScaleLayout,
    /// BF16, F16 or F32 `[N]`.
    pub bias: Option<&'a Tensor>,
}

/// [`scaled_mm`] of one input with several weights of the same K, such as a layer's query, key and value projections.
///
/// Gives the products in the order of the weights.
///
/// # Errors
/// Those of [`scaled_mm`], for any of the weights.
pub fn scaled_mm_many(input: Input<'_>, weights: &[Weight<'_>]) -> Result<Vec<Tensor>> {
    let (Input::Full(x) | Input::Quantize(x, _) | Input::Codes { codes: x, .. }) = input;
    // What gradients are tracked for goes through the op, whose backward pass refuses.
    let tracked = x.track_op()
        || weights
            .iter()
            .any(|w| w.codes.tensor().track_op() || w.scale.track_op());
    if x.device().is_cpu() && !tracked {
        return cpu::many(x, input, weights);
    }
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() && !tracked {
        return cuda::many(x, input, weights);
    }
    #[cfg(feature = "metal")]
    if x.device().is_metal() && !tracked {
        return metal::many(x, input, weights);
    }
    let product = |w: &Weight<'_>| scaled_mm(input, w.codes, w.scale, w.layout, w.bias);
    weights.iter().map(product).collect()
}

/// Checks what [`scaled_mm`] asks of a weight: F8E4M3 `[N, K]`, contiguous or packed, with an F32 scale as `layout` says on
/// the same device. Gives `(N, K)`.
///
/// # Errors
/// If it is not so.
pub fn check_weight<'a>(
    weight: impl Into<Codes<'a>>,
    weight_scale: &Tensor,
    layout: ScaleLayout,
) -> Result<(usize, usize)> {
    let weight = weight.into();
    let (n, k) = match weight {
        Codes::Packed(weight) => weight.dims(),
        Codes::Rows(weight) => {
            error::codes(OP, "weight", weight.dtype())?;
            error::contiguous(OP, weight)?;
            error::weight_dims(OP, "weight", weight)?
        }
    };
    error::dtype(
        OP,
        "weight_scale",
        weight_scale.dtype(),
        &[DType::F32],
        "F32",
    )?;
    error::weight_scale(OP, weight_scale, layout, n, k)?;
    error::device(OP, "weight_scale", weight_scale, weight.tensor().device())?;
    Ok((n, k))
}

/// What the op needs beside activations, weight and its scales. All of it is checked.
struct ScaledMm {
    m: usize,
    n: usize,
    k: usize,
    mode: Mode,
    /// Whether the weight lies in an order of its own.
    #[cfg_attr(not(feature = "cuda"), expect(dead_code))]
    in_panels: bool,
    layout: ScaleLayout,
    bias: Option<Tensor>,
    dtype: DType,
    shape: Shape,
}

enum Mode {
    Full,
    Quantize(Quantization),
    Codes { scales: Tensor, scaling: Scaling },
}

impl ScaledMm {
    fn check(
        input: Input<'_>,
        weight: Codes<'_>,
        weight_scale: &Tensor,
        layout: ScaleLayout,
        bias: Option<&Tensor>,
    ) -> Result<Self> {
        let (n, k) = check_weight(weight, weight_scale, layout)?;
        let device = weight.tensor().device();
        if let Some(bias) = bias {
            error::float(OP, "bias", bias.dtype())?;
            error::shape(OP, "bias", bias, &[n], "one for each output feature")?;
            error::device(OP, "bias", bias, device)?;
            if bias.track_op() {
                return Err(Error::NotTrainable { op: OP }.into());
            }
        }

        let (x, dtype, mode) = match input {
            Input::Full(x) => {
                error::float(OP, "x", x.dtype())?;
                (x, x.dtype(), Mode::Full)
            }
            Input::Quantize(x, quantization) => {
                error::float(OP, "x", x.dtype())?;
                error::quantization(OP, "input_scale", quantization)?;
                (x, x.dtype(), Mode::Quantize(quantization))
            }
            Input::Codes {
                codes,
                scales,
                group,
                dtype,
            } => {
                error::codes(OP, "x", codes.dtype())?;
                error::float(OP, "the result", dtype)?;
                let scaling = check_x_scales(codes, scales, group)?;
                let scales = scales.clone();
                (codes, dtype, Mode::Codes { scales, scaling })
            }
        };
        error::device(OP, "x", x, device)?;
        let (m, x_k) = error::rows(OP, "x", x)?;
        if x_k != k {
            return Err(Error::Shape {
                op: OP,
                tensor: "x",
                expected: format!("[.., {k}] for a weight [{n}, {k}]"),
                found: x.shape().clone(),
            }
            .into());
        }
        let mut shape = x.dims().to_vec();
        shape[x.rank() - 1] = n;
        Ok(Self {
            m,
            n,
            k,
            mode,
            in_panels: weight.in_panels(),
            layout,
            bias: bias.cloned(),
            dtype,
            shape: shape.into(),
        })
    }
}

fn check_x_scales(codes: &Tensor, scales: &Tensor, group: Option<usize>) -> Result<Scaling> {
    const NAME: &str = "x_scale";
    error::dtype(OP, NAME, scales.dtype(), &[DType::F32], "F32")?;
    error::device(OP, NAME, scales, codes.device())?;
    let (m, k) = error::rows(OP, "x", codes)?;
    let (scaling, groups) = match group {
        Some(group) => {
            error::group(OP, group)?;
            (Scaling::Group(group), k.div_ceil(group))
        }
        None if scales.dims() == [1] && m != 1 => return Ok(Scaling::Tensor),
        None => (Scaling::Token, 1),
    };
    let mut expected = codes.dims().to_vec();
    expected[codes.rank() - 1] = groups;
    let whole = group.is_none() && scales.dims() == [1];
    if !whole {
        error::shape(
            OP,
            NAME,
            scales,
            &expected,
            "one for each row and group; or [1]",
        )?;
    }
    Ok(scaling)
}

impl CustomOp3 for ScaledMm {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        weight_scale: &CpuStorage,
        weight_scale_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let weight = (weight, weight_layout);
        let scale = (weight_scale, weight_scale_layout);
        let storage = cpu::one(self, (x, x_layout), weight, scale)?;
        Ok((storage, self.shape.clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        weight: &CudaStorage,
        weight_layout: &Layout,
        weight_scale: &CudaStorage,
        weight_scale_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let weight = (weight, weight_layout);
        let scale = (weight_scale, weight_scale_layout);
        let storage = cuda::one(self, (x, x_layout), weight, scale)?;
        Ok((storage, self.shape.clone()))
    }

    #[cfg(not(feature = "cuda"))]
    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        Err(Error::NoCuda { op: OP }.into())
    }

    #[cfg(feature = "metal")]
    fn metal_fwd(
        &self,
        x: &MetalStorage,
        x_layout: &Layout,
        weight: &MetalStorage,
        weight_layout: &Layout,
        weight_scale: &MetalStorage,
        weight_scale_layout: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        let weight = (weight, weight_layout);
        let scale = (weight_scale, weight_scale_layout);
        let storage = metal::one(self, (x, x_layout), weight, scale)?;
        Ok((storage, self.shape.clone()))
    }

    #[cfg(not(feature = "metal"))]
    fn metal_fwd(
        &self,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        Err(Error::NoMetal { op: OP }.into())
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        Err(Error::NotTrainable { op: OP }.into())
    }
}
