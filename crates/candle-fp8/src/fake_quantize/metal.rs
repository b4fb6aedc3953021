//! Values through E4M3 on GPUs of Apple silicon.

use candle_core::backend::BackendStorage;
use candle_core::{Layout, MetalStorage, Result};
use candle_kernels_fp8::metal as kernels;

use super::OP;
use crate::metal::{On, Rows, View, float, slice};
use crate::strides::period;

/// The scale's layout is of the shape of `x`.
pub(super) fn fake_quantize(x: View<'_>, scale: View<'_>) -> Result<MetalStorage> {
    let on = On::new(OP, x.0.device());
    let x = Rows::flat(&on, x)?;
    let out = on.alloc(x.k, x.dtype())?;
    if x.k == 0 {
        return Ok(out);
    }
    let (run, scale) = match period(scale.1) {
        Some((run, count)) => {
            let once = Layout::contiguous_with_offset(count, scale.1.start_offset());
            (run, Rows::flat(&on, (scale.0, &once))?)
        }
        None => (1, Rows::flat(&on, scale)?),
    };
    let args = kernels::FakeQuantize {
        count: x.k,
        x: x.slice(),
        float: float(x.dtype())?,
        scales: scale.slice(),
        scale_count: scale.k,
        run,
        out: slice(&out),
    };
    kernels::fake_quantize(&on, &args)?;
    Ok(out)
}
