//! Activations to E4M3.

use candle_core::{DType, Device, Result, Tensor};

use crate::memory::Allocation;
use crate::program::{Arg, Source, Variant, struct_bytes};
use crate::rows::{self, Rows};
use crate::{Element, Error, XpuDevice};

/// How activations are quantized.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Quantization {
    /// Each row with a scale of its own.
    PerToken,
    /// All with one scale, from their largest magnitude.
    PerTensor,
    /// All with one scale that is given (`input_scale`), positive and finite.
    Static(f32),
    /// Groups of so many neighbours in a row with a scale of their own; not 0; the last group may be short.
    PerGroup(usize),
}

/// Quantizes each row of `x` with a scale of its own.
///
/// `x`: BF16, F16 or F32 `[.., K]` on the CPU, any strides; K, and the product of the others, below 2^31. Gives the
/// codes, F8E4M3 `[.., K]`, and the scales, F32 `[.., 1]`, on the CPU: the same bits as the CPU's own op, but for the
/// sign of NaN.
///
/// # Errors
/// If `x` is not as said, or the device fails.
pub fn quantize_per_token(device: &XpuDevice, x: &Tensor) -> Result<(Tensor, Tensor)> {
    run("quantize_per_token", device, x, Quantization::PerToken)
}

/// Quantizes groups of `group` neighbours in each row of `x` with a scale of their own; the last group may be short.
///
/// As [`quantize_per_token`], with scales `[.., ceil(K / group)]`.
///
/// # Errors
/// If `group` is 0, `x` is not as said, or the device fails.
pub fn quantize_per_group(
    device: &XpuDevice,
    x: &Tensor,
    group: usize,
) -> Result<(Tensor, Tensor)> {
    run(
        "quantize_per_group",
        device,
        x,
        Quantization::PerGroup(group),
    )
}

/// Quantizes `x` with one scale, from its largest magnitude.
///
/// As [`quantize_per_token`], with a scale `[1]`.
///
/// # Errors
/// If `x` is not as said, or the device fails.
pub fn quantize_per_tensor(device: &XpuDevice, x: &Tensor) -> Result<(Tensor, Tensor)> {
    run("quantize_per_tensor", device, x, Quantization::PerTensor)
}

/// Quantizes `x` with a scale that is given, such as a checkpoint's `input_scale`. Gives the codes.
///
/// # Errors
/// If `scale` is not positive and finite, `x` is not as [`quantize_per_token`] says, or the device fails.
pub fn quantize_static(device: &XpuDevice, x: &Tensor, scale: f32) -> Result<Tensor> {
    Ok(run("quantize_static", device, x, Quantization::Static(scale))?.0)
}

fn run(
    op: &'static str,
    device: &XpuDevice,
    x: &Tensor,
    quantization: Quantization,
) -> Result<(Tensor, Tensor)> {
    let (_, k) = rows::dims(op, "x", x)?;
    check(op, quantization)?;
    rows::float(op, "x", x)?;
    let shape = match quantization {
        Quantization::PerTensor | Quantization::Static(_) => vec![1],
        Quantization::PerToken | Quantization::PerGroup(_) => {
            let groups = k.div_ceil(group_of(quantization, k));
            [&x.dims()[..x.rank() - 1], &[groups]].concat()
        }
    };
    if x.elem_count() == 0 {
        return Ok((
            Tensor::zeros(x.dims(), DType::F8E4M3, &Device::Cpu)?,
            Tensor::full(scale_of_nothing(quantization), shape, &Device::Cpu)?,
        ));
    }
    let x_rows = Rows::of(device, op, x)?;
    let codes = Rows::of_result(device, x_rows.m, k, Element::E4m3)?;
    let scales = Allocation::of_result(device, &shape, DType::F32)?;
    let quantized = quantize_into(device, &x_rows, quantization, codes, scales)?;
    Ok((
        quantized.codes.into_tensor(x.dims())?,
        quantized.scales.into_tensor(&shape, DType::F32)?,
    ))
}

/// That of no values is that of zeros.
fn scale_of_nothing(quantization: Quantization) -> f32 {
    match quantization {
        Quantization::Static(scale) => scale,
        _ => 1.0 / 448.0,
    }
}

/// Refuses what nothing can be quantized with.
pub(crate) fn check(
    op: &'static str,
    quantization: Quantization,
) -> std::result::Result<(), Error> {
    let refused = |tensor, expected: &str, found| Error::Tensor {
        op,
        tensor,
        expected: expected.into(),
        found,
    };
    match quantization {
        Quantization::Static(scale) if !(scale.is_finite() && scale > 0.0) => Err(refused(
            "input_scale",
            "a positive, finite scale",
            scale.to_string(),
        )),
        Quantization::PerGroup(0) => Err(refused("group size", "at least 1", "0".to_string())),
        _ => Ok(()),
    }
}

fn group_of(quantization: Quantization, k: usize) -> usize {
    match quantization {
        Quantization::PerGroup(group) => group.min(k),
        _ => k,
    }
}

/// Activations that were quantized.
pub(crate) struct Quantized {
    pub(crate) codes: Rows,
    pub(crate) scales: Allocation,
    /// Scales of a row; 0 where all rows have one.
    pub(crate) scale_row: usize,
    /// Neighbours in a row that share a scale.
    pub(crate) scale_run: usize,
    /// Until the kernels are done.
    _magnitudes: Option<Allocation>,
}

/// Device twin: `Args` in `kernels/quantize.cl`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Args {
    m: u32,
    k: u32,
    x_stride: u32,
    codes_stride: u32,
    mode: u32,
    group: u32,
    count: u32,
    scale: f32,
}

/// Parts of a tensor whose largest magnitudes are found apart.
const PARTS: usize = 64;

/// Quantizes rows for products.
pub(crate) fn quantize(
    device: &XpuDevice,
    x: &Rows,
    quantization: Quantization,
) -> Result<Quantized> {
    let scales = match quantization {
        Quantization::PerTensor | Quantization::Static(_) => 1,
        Quantization::PerToken | Quantization::PerGroup(_) => {
            x.m * x.k.div_ceil(group_of(quantization, x.k))
        }
    };
    let codes = Rows::new(device, x.m, x.k, Element::E4m3)?;
    let scales = Allocation::new(device, scales * size_of::<f32>())?;
    quantize_into(device, x, quantization, codes, scales)
}

fn quantize_into(
    device: &XpuDevice,
    x: &Rows,
    quantization: Quantization,
    codes: Rows,
    scales: Allocation,
) -> Result<Quantized> {
    let group = group_of(quantization, x.k);
    let groups = x.k.div_ceil(group);
    let (mode, scale, scale_row) = match quantization {
        Quantization::PerToken | Quantization::PerGroup(_) => (0, 0.0, groups),
        Quantization::Static(scale) => (1, scale, 0),
        Quantization::PerTensor => (2, 0.0, 0),
    };
    let parts = PARTS.min(x.m);
    let args = Args {
        m: size(x.m),
        k: size(x.k),
        x_stride: size(x.stride),
        codes_stride: size(codes.stride),
        mode,
        group: size(group),
        count: size(parts),
        scale,
    };
    // SAFETY: eight numbers of four bytes.
    let sizes = unsafe { struct_bytes(&args) };
    let variant = || Variant {
        source: Source::Quantize,
        x: x.element,
        defines: Vec::new(),
    };
    let items = |values: usize| {
        values
            .next_power_of_two()
            .min(256)
            .min(floor_power(device.info().work_group))
    };

    let magnitudes = match quantization {
        Quantization::PerTensor => {
            let magnitudes = Allocation::new(device, parts * size_of::<u32>())?;
            let items = items(x.k);
            let args = [
                Arg::Memory(&x.memory),
                Arg::Memory(&magnitudes),
                Arg::Value(sizes),
                Arg::Local(items * 4),
            ];
            // SAFETY: these are the kernel's arguments, and the rows are as large as they say.
            unsafe { device.launch(variant(), "magnitudes", &args, [parts, 1], [items, 1]) }?;
            Some(magnitudes)
        }
        _ => None,
    };
    let items = items(group);
    let args = [
        Arg::Memory(&x.memory),
        Arg::Memory(&codes.memory),
        Arg::Memory(&scales),
        magnitudes.as_ref().map_or(Arg::Nothing, Arg::Memory),
        Arg::Value(sizes),
        Arg::Local(items * 4),
    ];
    // SAFETY: as above; there is a code for each value, and a scale for each group or one for all.
    unsafe { device.launch(variant(), "quantize", &args, [x.m * groups, 1], [items, 1]) }?;
    Ok(Quantized {
        codes,
        scales,
        scale_row,
        scale_run: group,
        _magnitudes: magnitudes,
    })
}

fn floor_power(value: usize) -> usize {
    1 << value.max(1).ilog2()
}

/// As kernels take sizes, which were checked.
pub(crate) fn size(value: usize) -> u32 {
    u32::try_from(value).expect("sizes fit 32 bits")
}
