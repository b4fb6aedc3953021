//! The inner activation of a gated MLP.

#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "metal")]
mod metal;

use candle_core::{DType, Result, Tensor};
use candle_kernels_fp8::cpu::{self, InstructionSet};

use crate::kernel::{self, Float, memory, on_float};
use crate::{Quantization, Quantized, error};

const OP: &str = "silu_mul";

/// `silu(gate) · up`, computed in f32 and rounded once.
///
/// `gate`: BF16, F16 or F32 of any shape and strides; `up`: shape and dtype of `gate`. Gives that shape and dtype.
///
/// # Errors
/// If a dtype, shape or device is not as said above.
pub fn silu_mul(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    check(gate, up)?;
    #[cfg(feature = "cuda")]
    if kernel::serves_cuda(&[gate, up]) {
        return cuda::silu_mul(gate, up, crate::cuda::Values);
    }
    #[cfg(feature = "metal")]
    if kernel::serves_metal(&[gate, up]) {
        return metal::silu_mul(gate, up, crate::metal::Values);
    }
    if !kernel::serves(&[gate, up]) {
        let [wide, up] = [gate.to_dtype(DType::F32)?, up.to_dtype(DType::F32)?];
        return (wide.silu()? * up)?.to_dtype(gate.dtype());
    }
    let (gate, up) = (gate.contiguous()?, up.contiguous()?);
    fn run<T: Float>(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
        let (gate_memory, up) = (memory(gate), memory(up));
        let values = gate_memory.values::<T>()?;
        let mut out = Vec::new();
        cpu::silu_mul(InstructionSet::best(), values, up.values()?, &mut out);
        Ok(kernel::tensor(out, gate))
    }
    on_float!(OP, gate.dtype(), T => run::<T>(&gate, &up))
}

/// [`silu_mul`], quantized for the linear that follows: what [`quantize`](crate::quantize) makes of it.
///
/// `gate`: `[.., K]`. On GPUs one kernel does both, except for [`Quantization::PerTensor`]. No gradient passes.
///
/// # Errors
/// Those of [`silu_mul`] and [`quantize`](crate::quantize).
pub fn silu_mul_quantize(
    gate: &Tensor,
    up: &Tensor,
    quantization: Quantization,
) -> Result<Quantized> {
    #[cfg(feature = "cuda")]
    if quantization.of_rows() && kernel::serves_cuda(&[gate, up]) {
        check(gate, up)?;
        error::rows(OP, "gate", gate)?;
        error::quantization(OP, "input_scale", quantization)?;
        return cuda::silu_mul(gate, up, quantization);
    }
    #[cfg(feature = "metal")]
    if quantization.of_rows() && kernel::serves_metal(&[gate, up]) {
        check(gate, up)?;
        error::rows(OP, "gate", gate)?;
        error::quantization(OP, "input_scale", quantization)?;
        return metal::silu_mul(gate, up, quantization);
    }
    crate::quantize(&silu_mul(gate, up)?, quantization)
}

fn check(gate: &Tensor, up: &Tensor) -> Result<()> {
    error::float(OP, "gate", gate.dtype())?;
    Ok(error::same(OP, "up", up, gate)?)
}
