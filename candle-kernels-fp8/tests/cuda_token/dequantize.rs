//! Dequantization: the same bits as on the CPU and as the oracle's.

use candle_kernels_fp8::ScaleLayout;
use candle_kernels_fp8::cpu::{self, Element};
use candle_kernels_fp8::cuda::{self, Dequantize, Float};
use half::{bf16, f16};

use crate::lengths;
use crate::oracle::{self, Layout, cases::Random};
use crate::rows::{FLOATS, POISON, assert_same, from_bytes, oracle_float, round, to_bytes};
use crate::support_cuda::Device;

fn on_cpu(
    codes: &[u8],
    k: usize,
    scales: &[f32],
    layout: ScaleLayout,
    (scale_float, out_float): (Float, Float),
) -> Vec<f32> {
    fn to<S: Element, T: Element>(
        codes: &[u8],
        k: usize,
        scales: &[f32],
        layout: ScaleLayout,
    ) -> Vec<f32> {
        let mut out = vec![T::default(); codes.len()];
        cpu::dequantize::<S, T>(codes, k, scales, layout, &mut out);
        out.into_iter().map(T::to_f32).collect()
    }
    fn from<S: Element>(
        codes: &[u8],
        k: usize,
        scales: &[f32],
        layout: ScaleLayout,
        out: Float,
    ) -> Vec<f32> {
        match out {
            Float::Bf16 => to::<S, bf16>(codes, k, scales, layout),
            Float::F16 => to::<S, f16>(codes, k, scales, layout),
            Float::F32 => to::<S, f32>(codes, k, scales, layout),
        }
    }
    match scale_float {
        Float::Bf16 => from::<bf16>(codes, k, scales, layout, out_float),
        Float::F16 => from::<f16>(codes, k, scales, layout, out_float),
        Float::F32 => from::<f32>(codes, k, scales, layout, out_float),
    }
}

fn oracle_layout(layout: ScaleLayout) -> Layout {
    match layout {
        ScaleLayout::Tensor => Layout::Tensor,
        ScaleLayout::Channel => Layout::Channel,
        ScaleLayout::Block { rows, cols } => Layout::Block(rows, cols),
    }
}

fn check(
    device: &Device,
    codes: &[u8],
    (k, stride): (usize, usize),
    scales: &[f32],
    layout: ScaleLayout,
    floats: (Float, Float),
) {
    let n = codes.len() / k;
    let mut apart = Vec::new();
    for row in codes.chunks(k) {
        apart.extend(row);
        apart.resize(apart.len() + stride - k, 0x7f);
    }
    let memory = device.upload(&apart);
    let device_scales = device.upload(&to_bytes(scales, Float::F32));
    let out = device.upload(&vec![POISON; codes.len() * floats.1.size()]);
    let args = Dequantize {
        n,
        k,
        codes: memory.address,
        codes_stride: stride,
        scales: device_scales.address,
        layout,
        scale_float: floats.0,
        out: out.address,
        out_float: floats.1,
        dependent: false,
    };
    // SAFETY: the memory is as large as the sizes say.
    unsafe { cuda::dequantize(&device.stream, &args) }.unwrap();
    let found = from_bytes(&device.download(&out).unwrap(), floats.1);
    let what = format!("[{n}, {k}], stride {stride}, {layout:?}, {floats:?}");
    assert_same(&found, &on_cpu(codes, k, scales, layout, floats), &what);
    let (scale_type, out_type) = (oracle_float(floats.0), oracle_float(floats.1));
    let layout = oracle_layout(layout);
    let expected = oracle::dequantize(codes, k, scales, layout, scale_type, out_type);
    let expected: Vec<f32> = expected.into_iter().map(|value| value as f32).collect();
    assert_same(&found, &expected, &format!("{what}, oracle"));
}

/// Of a type, and of all sizes that keep results finite in most cases.
fn scales(count: usize, float: Float, random: &mut Random) -> Vec<f32> {
    let scale = |i| {
        round(
            (1.5 + random.signed() / 2.0) * 2f32.powi(-(i as i32 % 20)),
            float,
        )
    };
    (0..count).map(scale).collect()
}

#[test]
fn every_layout_and_type() {
    let Some(device) = Device::get() else { return };
    let mut random = Random(11);
    let layouts = [
        ScaleLayout::Tensor,
        ScaleLayout::Channel,
        ScaleLayout::Block {
            rows: 128,
            cols: 128,
        },
        ScaleLayout::Block { rows: 3, cols: 5 },
        ScaleLayout::Block { rows: 1, cols: 24 },
        ScaleLayout::Block {
            rows: 1000,
            cols: 1,
        },
    ];
    for (n, k) in [
        (1, 256),
        (7, 64),
        (5, 33),
        (130, 256),
        (2, 1000),
        (131, 136),
    ] {
        // All codes, NaN included.
        let codes: Vec<u8> = (0..n * k).map(|i| (i * 37 + i / 256) as u8).collect();
        for layout in layouts {
            for scale_float in FLOATS {
                let scales = scales(layout.len(n, k), scale_float, &mut random);
                for out_float in FLOATS {
                    let floats = (scale_float, out_float);
                    check(&device, &codes, (k, k), &scales, layout, floats);
                }
                check(
                    &device,
                    &codes,
                    (k, cuda::padded(k) + 16),
                    &scales,
                    layout,
                    (scale_float, Float::Bf16),
                );
            }
        }
    }
}

#[test]
fn every_length() {
    let Some(device) = Device::get() else { return };
    let mut random = Random(12);
    for k in lengths() {
        let codes: Vec<u8> = (0..3 * k).map(|_| random.bits() as u8).collect();
        for layout in [
            ScaleLayout::Channel,
            ScaleLayout::Block { rows: 2, cols: 128 },
        ] {
            let scales = scales(layout.len(3, k), Float::Bf16, &mut random);
            let floats = (Float::Bf16, FLOATS[k % 3]);
            check(&device, &codes, (k, k + k % 2), &scales, layout, floats);
        }
    }
}

/// Scales whose products over- or underflow.
#[test]
fn extreme_scales() {
    let Some(device) = Device::get() else { return };
    let codes: Vec<u8> = (0..=255).collect();
    for scale in [
        0.0,
        1e-45,
        1e-40,
        1e-38,
        6e-8,
        300.0,
        65504.0,
        1e36,
        f32::MAX,
        f32::INFINITY,
        f32::NAN,
    ] {
        for scale_float in FLOATS {
            for out_float in FLOATS {
                let scales = [round(scale, scale_float)];
                check(
                    &device,
                    &codes,
                    (256, 256),
                    &scales,
                    ScaleLayout::Tensor,
                    (scale_float, out_float),
                );
            }
        }
    }
}
