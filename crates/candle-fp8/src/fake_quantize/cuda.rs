//! Values through E4M3 on NVIDIA GPUs.

use candle_core::{CudaStorage, Layout, Result};
use candle_kernels_fp8::cuda as kernels;

use super::OP;
use crate::cuda::{On, Rows, View, float, writes};
use crate::strides::period;

/// The scale's layout is of the shape of `x`.
pub(super) fn fake_quantize(x: View<'_>, scale: View<'_>) -> Result<CudaStorage> {
    let on = On::new(OP, &x.0.device);
    let x = Rows::flat(&on, x)?;
    let mut out = on.alloc(x.k, x.dtype())?;
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
    {
        let reads_x = x.reads(on.stream())?;
        let scales = scale.reads(on.stream())?;
        let writes = writes(&mut out, on.stream())?;
        let args = kernels::FakeQuantize {
            count: x.k,
            x: reads_x.address,
            float: float(x.dtype())?,
            scales: scales.address,
            scale_count: scale.k,
            run,
            out: writes.address,
            dependent: false,
        };
        // SAFETY: values and results are as many as the sizes say, and so are the scales; all live until they are freed in
        // the stream's order.
        on.launched(unsafe { kernels::fake_quantize(on.stream(), &args) })?;
    }
    Ok(out)
}
