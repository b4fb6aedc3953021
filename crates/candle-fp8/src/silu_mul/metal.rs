//! The inner activation on GPUs of Apple silicon.

use candle_core::backend::BackendStorage;
use candle_core::{Result, Tensor};
use candle_kernels_fp8::metal as kernels;

use super::OP;
use crate::metal::{Destination, On, Rows, float, on_metal};

/// Gives what `to` makes of the activations.
pub(super) fn silu_mul<D: Destination>(gate: &Tensor, up: &Tensor, to: D) -> Result<D::Made> {
    let (storage, layout) = gate.storage_and_layout();
    let (up, up_layout) = up.storage_and_layout();
    let storage = on_metal(&storage)?;
    let on = On::new(OP, storage.device());
    let rows = Rows::of(&on, (storage, layout))?;
    let up = Rows::of(&on, (on_metal(&up)?, up_layout))?;
    let float = float(gate.dtype())?;
    to.make(&on, gate, |out| {
        if rows.k == 0 {
            return Ok(());
        }
        let args = kernels::SiluMul {
            m: rows.m,
            k: rows.k,
            gate: rows.slice(),
            gate_stride: rows.stride,
            up: up.slice(),
            up_stride: up.stride,
            float,
            out,
        };
        kernels::silu_mul(&on, &args)
    })
}
