//! Quantizing on the CPU.

use candle_kernels_fp8::cpu;

use crate::Quantization;

/// The codes of rows of `k` and their scales, as many as `quantization` asks for.
pub(crate) fn quantize(
    values: &[f32],
    k: usize,
    quantization: Quantization,
) -> (Vec<u8>, Vec<f32>) {
    let mut codes = vec![0u8; values.len()];
    let scales = match quantization {
        Quantization::PerTensor => vec![cpu::quantize_tensor(values, &mut codes)],
        Quantization::Static(scale) => {
            cpu::quantize_static(values, scale, &mut codes);
            vec![scale]
        }
        Quantization::PerToken => groups(values, k, k, &mut codes),
        Quantization::PerGroup(group) => groups(values, k, group, &mut codes),
    };
    (codes, scales)
}

fn groups(values: &[f32], k: usize, group: usize, codes: &mut [u8]) -> Vec<f32> {
    let mut scales = vec![0f32; values.len() / k * k.div_ceil(group)];
    cpu::quantize_groups(values, k, group, codes, &mut scales);
    scales
}
