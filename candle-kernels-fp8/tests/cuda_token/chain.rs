//! Kernels that start while the one before still runs: each waits for what it reads, and before it overwrites what
//! others read.

use candle_kernels_fp8::cuda::{self, Float, Quantize, Residual, RmsNorm, SiluMul};

use crate::rows::{Codes, Mode, Rows, Values, activations};
use crate::support_cuda::Device;

/// Layers of a model, as it were: norm of a growing residual, activation, quantization, all in the same few buffers,
/// which the next layer overwrites.
fn layers(
    device: &Device,
    (m, k): (usize, usize),
    dependent: bool,
) -> (Vec<f32>, Vec<u8>, Vec<f32>) {
    let float = Float::Bf16;
    let x = Rows::new(device, &activations(m, k, float, 1), k, k, float);
    let weight = Rows::new(device, &activations(1, k, float, 2), k, k, float);
    let (sum, normed) = (
        Values::new(device, m, k, k, float),
        Values::new(device, m, k, k, float),
    );
    let inner = Values::new(device, m, k / 2, k / 2, float);
    let codes = Codes::new(device, m, k / 2, k / 2, Mode::Token);
    let stream = &device.stream;
    for layer in 0..20 {
        let (residual, added) = match layer {
            0 => (x.address(), x.address()),
            _ => (sum.address(), normed.address()),
        };
        let norm = RmsNorm {
            m,
            k,
            x: added,
            row_stride: k,
            residual: Some(Residual {
                values: residual,
                stride: k,
                sum: sum.address(),
                sum_stride: k,
            }),
            weight: weight.address(),
            eps: 1e-5,
            float,
            out: normed.output(),
            dependent,
        };
        let silu = SiluMul {
            m,
            k: k / 2,
            gate: normed.address(),
            gate_stride: k,
            up: normed.address() + k as u64,
            up_stride: k,
            float,
            out: inner.output(),
            dependent,
        };
        let quantize = Quantize {
            m,
            k: k / 2,
            x: inner.address(),
            float,
            row_stride: k / 2,
            codes: codes.address(),
            codes_stride: k / 2,
            quantization: codes.quantization(),
            dependent,
        };
        // SAFETY: the memory is as large as the sizes say; the weight is written by nothing.
        unsafe {
            cuda::rms_norm(stream, &norm).unwrap();
            cuda::silu_mul(stream, &silu).unwrap();
            cuda::quantize(stream, &quantize).unwrap();
            // At once, to the same codes and scales.
            let fused = SiluMul {
                out: codes.output(),
                ..silu
            };
            cuda::silu_mul(stream, &fused).unwrap();
        }
    }
    let quantized = codes.get(device);
    (sum.get(device), quantized.codes, quantized.scales)
}

#[test]
fn dependent_launches_change_nothing() {
    let Some(device) = Device::get() else { return };
    for (m, k) in [
        (1, 4096),
        (1, 28672),
        (7, 4096),
        (33, 16384),
        (300, 4096),
        (2000, 1024),
    ] {
        let apart = layers(&device, (m, k), false);
        for _ in 0..3 {
            assert!(layers(&device, (m, k), true) == apart, "[{m}, {k}]");
        }
    }
}
