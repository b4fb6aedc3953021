//! Quantizing on NVIDIA GPUs.

use candle_core::{DType, Result, Tensor};
use candle_kernels_fp8::cuda::{self as kernels, Address, QuantizeTensor, TENSOR_SCRATCH};
use candle_kernels_fp8::e4m3;

use crate::cuda::{On, Rows, codes, float, on_cuda, writes};
use crate::{Quantization, Quantized};

pub(super) fn quantize(
    op: &'static str,
    x: &Tensor,
    quantization: Quantization,
) -> Result<Quantized> {
    let (storage, layout) = x.storage_and_layout();
    let storage = on_cuda(&storage)?;
    let on = On::new(op, &storage.device);
    let rows = Rows::of(&on, (storage, layout))?;
    codes(&on, x, quantization, |codes, scales| {
        let to = To {
            codes,
            stride: rows.k,
            scales,
        };
        // SAFETY: there is a code for each value, and as many scales as the quantization asks for.
        unsafe { launch(&on, &rows, quantization, to) }
    })
}

/// Where codes and scales go.
pub(crate) struct To {
    /// E4M3 `[m, k]`.
    pub(crate) codes: Address,
    /// Bytes from one row of codes to the next; what is between them becomes zero.
    pub(crate) stride: usize,
    /// F32, as many as [`Quantization::scaling`] says.
    pub(crate) scales: Address,
}

/// Launches what quantizes rows, and writes their scales down, that which is given included.
///
/// # Safety
/// The addresses are of memory of the device, as large as the rows and the quantization ask for, and valid until the
/// stream has passed the launch.
pub(crate) unsafe fn launch(
    on: &On<'_>,
    x: &Rows<'_>,
    quantization: Quantization,
    to: To,
) -> Result<()> {
    match quantization {
        // SAFETY: there is one scale.
        Quantization::Static(scale) => unsafe { on.write(to.scales, scale) }?,
        Quantization::PerTensor if x.m == 0 => {
            // That of no values is that of zeros; no kernel looks at them.
            // SAFETY: as above.
            unsafe { on.write(to.scales, 1.0 / e4m3::MAX) }?;
        }
        _ => {}
    }
    if x.m == 0 {
        return Ok(());
    }
    let float = float(x.dtype())?;
    let reads = x.reads(on.stream())?;
    let scales = to.scales;
    let quantization = match quantization {
        Quantization::PerTensor => {
            let mut scratch = on.alloc(TENSOR_SCRATCH, DType::U8)?;
            let scratch = writes(&mut scratch, on.stream())?;
            let args = QuantizeTensor {
                m: x.m,
                k: x.k,
                x: reads.address,
                float,
                row_stride: x.stride,
                codes: to.codes,
                codes_stride: to.stride,
                scale: scales,
                scratch: scratch.address,
                dependent: false,
            };
            // SAFETY: the rows and the scratch memory live until they are freed in the stream's order; the caller vouches
            // for the rest.
            return on.launched(unsafe { kernels::quantize_tensor(on.stream(), &args) });
        }
        Quantization::Static(scale) => kernels::Quantization::Static { scale },
        Quantization::PerToken => kernels::Quantization::Token { scales },
        Quantization::PerGroup(group) => kernels::Quantization::Group {
            group: group.min(x.k),
            scales,
        },
    };
    let args = kernels::Quantize {
        m: x.m,
        k: x.k,
        x: reads.address,
        float,
        row_stride: x.stride,
        codes: to.codes,
        codes_stride: to.stride,
        quantization,
        dependent: false,
    };
    // SAFETY: as above.
    on.launched(unsafe { kernels::quantize(on.stream(), &args) })
}
