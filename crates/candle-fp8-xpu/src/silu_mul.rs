//! The inner activation of a gated MLP, and the MLP as a whole.

use candle_core::{Device, Result, Tensor};

use crate::program::{Arg, Source, Variant, struct_bytes};
use crate::quantize::{check, size};
use crate::rows::{self, Rows};
use crate::scaled_mm::{Activations, Input, check_operands, element_of, product};
use crate::{Error, Quantization, XpuDevice, XpuWeight};

const OP: &str = "silu_mul";

/// Device twin: `Args` in `kernels/silu_mul.cl`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Args {
    m: u32,
    k: u32,
    gate_stride: u32,
    up_stride: u32,
    out_stride: u32,
}

/// `silu(gate) · up`, computed in f32 and rounded once: the same bits as the CPU's own op.
///
/// `gate`, `up`: BF16, F16 or F32 `[.., K]` on the CPU, of one shape and dtype. Gives that shape and dtype, on the CPU.
///
/// # Errors
/// If a tensor is not as said, or the device fails.
pub fn silu_mul(device: &XpuDevice, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let element = rows::float(OP, "gate", gate)?;
    rows::dims(OP, "gate", gate)?;
    if up.dims() != gate.dims() || up.dtype() != gate.dtype() || !up.device().is_cpu() {
        return Err(rows::refused(
            OP,
            "up",
            format!("{:?} {:?} on the CPU", gate.dtype(), gate.dims()),
            up,
        ));
    }
    if gate.elem_count() == 0 {
        return Tensor::zeros(gate.dims(), gate.dtype(), &Device::Cpu);
    }
    let (gate_rows, up) = (Rows::of(device, OP, gate)?, Rows::of(device, OP, up)?);
    let out = Rows::of_result(device, gate_rows.m, gate_rows.k, element)?;
    apply(device, &gate_rows, &up, out)?.into_tensor(gate.dims())
}

fn apply(device: &XpuDevice, gate: &Rows, up: &Rows, out: Rows) -> Result<Rows> {
    let args = Args {
        m: size(gate.m),
        k: size(gate.k),
        gate_stride: size(gate.stride),
        up_stride: size(up.stride),
        out_stride: size(out.stride),
    };
    // SAFETY: five numbers of four bytes.
    let args = Arg::Value(unsafe { struct_bytes(&args) });
    let args = [
        Arg::Memory(&gate.memory),
        Arg::Memory(&up.memory),
        Arg::Memory(&out.memory),
        args,
    ];
    let variant = Variant {
        source: Source::SiluMul,
        x: gate.element,
        defines: Vec::new(),
    };
    let items = device.info().work_group.min(64);
    // SAFETY: these are the kernel's arguments, and the rows are as large as they say.
    unsafe {
        device.launch(
            variant,
            "silu_mul",
            &args,
            [out.stride.div_ceil(items), gate.m],
            [items, 1],
        )
    }?;
    Ok(out)
}

/// `down(silu(gate(x)) · up(x))`: what [`scaled_mm_many`](crate::scaled_mm_many), [`silu_mul`] and
/// [`scaled_mm`](crate::scaled_mm) give one after the other, bit by bit, with nothing copied between them.
///
/// `input`: `[.., K]` as gate and up take it; `quantization` is that of what `down` takes, `None` if it keeps its
/// precision. Gives `[.., N of down]` in the input's dtype, on the CPU.
///
/// # Errors
/// Those of the three; and if the weights' sizes do not fit each other.
pub fn gated_mlp(
    input: Input<'_>,
    gate: &XpuWeight,
    up: &XpuWeight,
    down: &XpuWeight,
    quantization: Option<Quantization>,
) -> Result<Tensor> {
    const OP: &str = "gated_mlp";
    let (x, device) = (input.tensor(), gate.device());
    for weight in [gate, up] {
        check_operands(input, weight, device)?;
    }
    if let Some(quantization) = quantization {
        check(OP, quantization)?;
    }
    if gate.n != up.n || gate.n != down.k || down.device() != device {
        return Err(Error::Tensor {
            op: OP,
            tensor: "down",
            expected: format!(
                "[.., {}] on {}, as {gate:?} and {up:?} ask for",
                gate.n,
                device.info().name
            ),
            found: format!("{down:?}"),
        }
        .into());
    }
    let shape = [&x.dims()[..x.rank() - 1], &[down.n]].concat();
    if x.elem_count() == 0 {
        return Tensor::zeros(shape, x.dtype(), &Device::Cpu);
    }
    let element = element_of(x)?;
    let own = match input {
        Input::Full(_) => None,
        Input::Quantize(_, quantization) => Some(quantization),
    };
    let activations = Activations::new(device, Rows::of(device, OP, x)?, own)?;
    let m = activations.rows().m;
    let inner = |weight| product(weight, &activations, Rows::new(device, m, gate.n, element)?);
    let (gated, values) = (inner(gate)?, inner(up)?);
    let inner = apply(
        device,
        &gated,
        &values,
        Rows::new(device, m, gate.n, element)?,
    )?;
    let inner = Activations::new(device, inner, quantization)?;
    product(down, &inner, Rows::of_result(device, m, down.n, element)?)?.into_tensor(&shape)
}
