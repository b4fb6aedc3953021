//! Activations times FP8 weights.

use candle_core::{Device, Result, Tensor};

use crate::kernel_choice::{Choice, Kernel};
use crate::memory::Allocation;
use crate::program::{Arg, struct_bytes};
use crate::quantize::{Quantized, check, quantize, size};
use crate::rows::{self, Rows};
use crate::{Element, Error, Quantization, XpuDevice, XpuWeight};

const OP: &str = "scaled_mm";

/// The activations of a [`scaled_mm`].
#[derive(Debug, Clone, Copy)]
pub enum Input<'a> {
    /// As they are (W8A16): BF16, F16 or F32 `[.., K]` on the CPU.
    Full(&'a Tensor),
    /// BF16, F16 or F32 `[.., K]` on the CPU, quantized on the device (W8A8).
    Quantize(&'a Tensor, Quantization),
}

impl<'a> Input<'a> {
    pub(crate) fn tensor(self) -> &'a Tensor {
        let (Self::Full(x) | Self::Quantize(x, _)) = self;
        x
    }

    fn quantization(self) -> Option<Quantization> {
        match self {
            Self::Full(_) => None,
            Self::Quantize(_, quantization) => Some(quantization),
        }
    }
}

/// `x · weightᵀ`, with scales, and a bias added: `[.., N]` in the input's dtype, on the CPU. One copy of the input to
/// the device, where it does not read tensors themselves, and one of the result back, where it does not write there.
///
/// # Errors
/// If a dtype, shape or device is not as said, a static scale is not positive and finite, or the device fails.
pub fn scaled_mm(input: Input<'_>, weight: &XpuWeight) -> Result<Tensor> {
    let mut results = scaled_mm_many(input, &[weight])?;
    Ok(results.remove(0))
}

/// [`scaled_mm`] of one input with several weights of the same K, such as a layer's query, key and value projections.
/// The input is copied and quantized once.
///
/// Gives the products in the order of the weights.
///
/// # Errors
/// Those of [`scaled_mm`], for any of the weights; and if the weights are on different devices.
pub fn scaled_mm_many(input: Input<'_>, weights: &[&XpuWeight]) -> Result<Vec<Tensor>> {
    let x = input.tensor();
    let Some(first) = weights.first() else {
        return Ok(Vec::new());
    };
    let device = &first.device;
    for weight in weights {
        check_operands(input, weight, device)?;
    }
    let shape = |n: usize| [&x.dims()[..x.rank() - 1], &[n]].concat();
    if x.elem_count() == 0 {
        let zeros = |weight: &&XpuWeight| Tensor::zeros(shape(weight.n), x.dtype(), &Device::Cpu);
        return weights.iter().map(zeros).collect();
    }
    let x = Rows::of(device, OP, x)?;
    let element = x.element;
    let activations = Activations::new(device, x, input.quantization())?;
    let products = weights
        .iter()
        .map(|weight| {
            let out = Rows::of_result(device, activations.rows().m, weight.n, element)?;
            product(weight, &activations, out)
        })
        .collect::<Result<Vec<_>>>()?;
    let results = products.into_iter().zip(weights);
    results
        .map(|(product, weight)| product.into_tensor(&shape(weight.n)))
        .collect()
}

/// Refuses what does not fit together.
pub(crate) fn check_operands(
    input: Input<'_>,
    weight: &XpuWeight,
    device: &XpuDevice,
) -> Result<()> {
    let x = input.tensor();
    let (_, k) = rows::dims(OP, "x", x)?;
    rows::float(OP, "x", x)?;
    if let Some(quantization) = input.quantization() {
        check(OP, quantization)?;
    }
    let (n, weight_k) = weight.dims();
    if k != weight_k {
        let expected = format!("of shape [.., {weight_k}] for a weight [{n}, {weight_k}]");
        return Err(rows::refused(OP, "x", expected, x));
    }
    if weight.device() != device {
        return Err(Error::Tensor {
            op: OP,
            tensor: "weight",
            expected: format!("on {}, as the others", device.info().name),
            found: format!("on {}", weight.device().info().name),
        }
        .into());
    }
    Ok(())
}

/// Activations as products take them.
pub(crate) enum Activations {
    Values(Rows),
    Codes {
        quantized: Quantized,
        /// What was quantized, until the kernels are done.
        _values: Rows,
    },
}

impl Activations {
    pub(crate) fn new(
        device: &XpuDevice,
        values: Rows,
        quantization: Option<Quantization>,
    ) -> Result<Self> {
        Ok(match quantization {
            None => Self::Values(values),
            Some(quantization) => {
                let quantized = quantize(device, &values, quantization)?;
                Self::Codes {
                    quantized,
                    _values: values,
                }
            }
        })
    }

    pub(crate) fn rows(&self) -> &Rows {
        match self {
            Self::Values(rows) => rows,
            Self::Codes { quantized, .. } => &quantized.codes,
        }
    }

    /// Scales, how many a row has, and how many neighbours share one.
    fn scales(&self) -> (Option<&Allocation>, usize, usize) {
        match self {
            Self::Values(rows) => (None, 0, rows.k),
            Self::Codes { quantized, .. } => (
                Some(&quantized.scales),
                quantized.scale_row,
                quantized.scale_run,
            ),
        }
    }
}

/// Device twin: `Args` in `kernels/scaled_mm.h`, which says what the fields mean.
#[derive(Clone, Copy)]
#[repr(C)]
struct Args {
    m: u32,
    n: u32,
    k: u32,
    x_stride: u32,
    weight_stride: u32,
    out_stride: u32,
    x_scale_row: u32,
    x_scale_run: u32,
    weight_scale_rows: u32,
    weight_scale_row: u32,
    weight_scale_run: u32,
    bias_type: u32,
    out_type: u32,
}

/// `NONE` in `kernels/common.h`.
const NO_BIAS: u32 = 4;

/// Computes a product into `out`, `[m, n]`.
pub(crate) fn product(weight: &XpuWeight, activations: &Activations, out: Rows) -> Result<Rows> {
    let device = &weight.device;
    let x = activations.rows();
    let (x_scales, x_scale_row, x_scale_run) = activations.scales();
    let args = Args {
        m: size(x.m),
        n: size(weight.n),
        k: size(x.k),
        x_stride: size(x.stride),
        weight_stride: size(weight.stride),
        out_stride: size(out.stride),
        x_scale_row: size(x_scale_row),
        x_scale_run: size(x_scale_run),
        weight_scale_rows: size(weight.scale_rows),
        weight_scale_row: size(weight.scale_row),
        weight_scale_run: size(weight.scale_run),
        bias_type: weight
            .bias
            .as_ref()
            .map_or(NO_BIAS, |(_, element)| *element as u32),
        out_type: out.element as u32,
    };
    // SAFETY: thirteen numbers of four bytes.
    let args = Arg::Value(unsafe { struct_bytes(&args) });
    let args = [
        Arg::Memory(&x.memory),
        x_scales.map_or(Arg::Nothing, Arg::Memory),
        Arg::Memory(&weight.codes),
        Arg::Memory(&weight.scales),
        weight
            .bias
            .as_ref()
            .map_or(Arg::Nothing, |(bias, _)| Arg::Memory(bias)),
        Arg::Memory(&out.memory),
        args,
    ];
    let kernel = Kernel::choose(
        device,
        &Choice {
            m: x.m,
            k: x.k,
            x: x.element,
            x_run: x_scale_run,
            weight_run: weight.scale_run,
        },
    );
    let launch = kernel.launch(device, x.element, x.m, weight.n);
    // SAFETY: these are the arguments of all kernels of products; rows are padded to what they read at once, and the
    // result is as large as they say.
    unsafe {
        device.launch(
            launch.variant,
            launch.name,
            &args,
            launch.groups,
            launch.items,
        )
    }?;
    Ok(out)
}

/// What a result is in where it is computed on from.
pub(crate) fn element_of(x: &Tensor) -> Result<Element> {
    rows::float(OP, "x", x)
}
