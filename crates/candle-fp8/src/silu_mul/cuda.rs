//! The inner activation on NVIDIA GPUs.

use candle_core::{Result, Tensor};
use candle_kernels_fp8::cuda as kernels;

use super::OP;
use crate::cuda::{Destination, On, Rows, float, on_cuda};

/// Gives what `to` makes of the activations.
pub(super) fn silu_mul<D: Destination>(gate: &Tensor, up: &Tensor, to: D) -> Result<D::Made> {
    let (storage, layout) = gate.storage_and_layout();
    let (up, up_layout) = up.storage_and_layout();
    let storage = on_cuda(&storage)?;
    let on = On::new(OP, &storage.device);
    let rows = Rows::of(&on, (storage, layout))?;
    let up = Rows::of(&on, (on_cuda(&up)?, up_layout))?;
    let (gate_values, up_values) = (rows.reads(on.stream())?, up.reads(on.stream())?);
    let float = float(gate.dtype())?;
    to.make(&on, gate, |out| {
        if rows.k == 0 {
            return Ok(());
        }
        let args = kernels::SiluMul {
            m: rows.m,
            k: rows.k,
            gate: gate_values.address,
            gate_stride: rows.stride,
            up: up_values.address,
            up_stride: up.stride,
            float,
            out,
            dependent: false,
        };
        // SAFETY: the shapes are checked; all lives until it is freed in the stream's order.
        unsafe { kernels::silu_mul(on.stream(), &args) }
    })
}
