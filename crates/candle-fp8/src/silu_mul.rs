//! The inner activation of a gated MLP.

use candle_core::{DType, Result, Tensor};
use candle_kernels_fp8::cpu::{self, InstructionSet};

use crate::error;
use crate::kernel::{self, Float, memory, on_float};

const OP: &str = "silu_mul";

/// `silu(gate) · up`, computed in f32 and rounded once.
///
/// `gate`: BF16, F16 or F32 of any shape and strides; `up`: shape and dtype of `gate`. Gives that shape and dtype.
///
/// # Errors
/// If a dtype, shape or device is not as said above.
pub fn silu_mul(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    error::float(OP, "gate", gate.dtype())?;
    error::same(OP, "up", up, gate)?;
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
