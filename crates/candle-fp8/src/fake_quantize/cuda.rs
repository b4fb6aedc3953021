//! Values through E4M3 on NVIDIA GPUs.

use candle_core::{CudaStorage, Layout, Result};
use candle_kernels_fp8::cuda as kernels;

use super::OP;
use crate::cuda::{On, Rows, View, float, writes};

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

/// For a layout in which values repeat: how often each comes in a row, and how many there are, one after the other in
/// memory, before the first comes again. None if they do not repeat so.
fn period(layout: &Layout) -> Option<(usize, usize)> {
    let axes = || layout.dims().iter().zip(layout.stride()).rev();
    let mut axes = axes().filter(|(dim, _)| **dim != 1).peekable();
    let (mut run, mut count) = (1, 1);
    while let Some((dim, _)) = axes.next_if(|(_, stride)| **stride == 0) {
        run *= dim;
    }
    while let Some((dim, _)) = axes.next_if(|(_, stride)| **stride == count) {
        count *= dim;
    }
    axes.all(|(_, stride)| *stride == 0).then_some((run, count))
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Shape;

    #[test]
    fn scales_of_heads_repeat() {
        let of = |dims: &[usize], strides: &[usize]| {
            period(&Layout::new(Shape::from(dims), strides.to_vec(), 0))
        };
        // Keys [B, H, L, D] with one scale, and with one for each head.
        assert_eq!(of(&[2, 3, 5, 7], &[0, 0, 0, 0]), Some((210, 1)));
        assert_eq!(of(&[2, 3, 5, 7], &[0, 1, 0, 0]), Some((35, 3)));
        assert_eq!(of(&[2, 3, 5, 1], &[0, 1, 0, 9]), Some((5, 3)));
        // One for each value, for each column, for each row; in another order.
        assert_eq!(of(&[4, 5], &[5, 1]), Some((1, 20)));
        assert_eq!(of(&[4, 5], &[0, 1]), Some((1, 5)));
        assert_eq!(of(&[4, 5], &[1, 0]), Some((5, 4)));
        assert_eq!(of(&[4, 5], &[1, 4]), None);
        assert_eq!(of(&[2, 4, 5], &[1, 0, 2]), None);
        assert_eq!(of(&[], &[]), Some((1, 1)));
    }
}
