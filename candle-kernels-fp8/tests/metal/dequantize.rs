//! Dequantization and `fake_quantize`: the same bits as on the CPU and as the oracle's.

use candle_kernels_fp8::ScaleLayout;
use candle_kernels_fp8::cpu;
use candle_kernels_fp8::metal::{self, Dequantize, FakeQuantize, Float};

use crate::emulator::Emulator;
use crate::oracle::{self, Layout, cases::Random};
use crate::values::{
    FLOATS, POISON, activations, apart, assert_same, from_bytes, lengths, oracle_float, round,
    to_bytes,
};

fn check(
    device: &Emulator,
    codes: &[u8],
    (k, stride): (usize, usize),
    scales: &[f32],
    layout: ScaleLayout,
    (scale_float, out_float): (Float, Float),
) {
    let n = codes.len() / k;
    let memory = device.upload(&apart(codes, k, stride));
    let device_scales = device.upload(&to_bytes(scales, Float::F32));
    let out = device.upload(&vec![POISON; codes.len() * out_float.size()]);
    let args = Dequantize {
        n,
        k,
        codes: memory.slice(),
        codes_stride: stride,
        scales: device_scales.slice(),
        layout,
        scale_float,
        out: out.slice(),
        out_float,
    };
    metal::dequantize(device, &args).unwrap();
    let found = from_bytes(&device.download(&out), out_float);
    let of_oracle = match layout {
        ScaleLayout::Tensor => Layout::Tensor,
        ScaleLayout::Channel => Layout::Channel,
        ScaleLayout::Block { rows, cols } => Layout::Block(rows, cols),
    };
    let (scale_type, out_type) = (oracle_float(scale_float), oracle_float(out_float));
    let expected = oracle::dequantize(codes, k, scales, of_oracle, scale_type, out_type);
    let expected: Vec<f32> = expected.into_iter().map(|value| value as f32).collect();
    let what = format!("[{n}, {k}], stride {stride}, {layout:?}, {scale_float:?}, {out_float:?}");
    assert_same(&found, &expected, &what);
    device.clear();
}

/// Of a type, and of all sizes that keep results finite in most cases.
fn scales(count: usize, float: Float, random: &mut Random) -> Vec<f32> {
    let scale = |i: usize| (1.5 + random.signed() / 2.0) * 2f32.powi(-(i as i32 % 20));
    (0..count)
        .map(scale)
        .map(|scale| round(scale, float))
        .collect()
}

#[test]
fn every_layout_and_type() {
    let Some(device) = Emulator::get() else {
        return;
    };
    let mut random = Random(11);
    let block = |rows, cols| ScaleLayout::Block { rows, cols };
    let layouts = [
        ScaleLayout::Tensor,
        ScaleLayout::Channel,
        block(128, 128),
        block(3, 5),
        block(1, 24),
        block(1000, 1),
    ];
    for (n, k) in [(1, 256), (7, 64), (5, 33), (131, 136)] {
        // All codes, NaN included.
        let codes: Vec<u8> = (0..n * k).map(|i| (i * 37 + i / 256) as u8).collect();
        for layout in layouts {
            for scale_float in FLOATS {
                let scales = scales(layout.len(n, k), scale_float, &mut random);
                for out_float in FLOATS {
                    let stride = k + 7 * out_float as usize;
                    let floats = (scale_float, out_float);
                    check(&device, &codes, (k, stride), &scales, layout, floats);
                }
            }
        }
    }
    device.assert_all_launched("dequantize_");
}

#[test]
fn every_length() {
    let Some(device) = Emulator::get() else {
        return;
    };
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

/// Scales whose products over- or underflow, and all those around where arithmetic changes to integers.
#[test]
fn extreme_scales() {
    let Some(device) = Emulator::get() else {
        return;
    };
    let codes: Vec<u8> = (0..=255).collect();
    let mut random = Random(13);
    let tiny = (0..0x0580_0000)
        .step_by(0x3_1f37)
        .map(|bits: u32| bits | (random.bits() & 1));
    let tiny: Vec<f32> = tiny.map(f32::from_bits).collect();
    let others = [
        0.0,
        1e-45,
        1e-40,
        1e-38,
        6e-8,
        300.0,
        65504.0,
        1e36,
        f32::MAX,
    ];
    for scale in others.into_iter().chain(tiny) {
        let float = FLOATS[scale.to_bits() as usize % 3];
        let floats = (Float::F32, float);
        check(
            &device,
            &codes,
            (256, 256),
            &[scale],
            ScaleLayout::Tensor,
            floats,
        );
    }
}

#[test]
fn values_through_codes() {
    let Some(device) = Emulator::get() else {
        return;
    };
    let mut tiny = Random(14);
    for float in FLOATS {
        for (count, run, scales) in [
            (1, 1, vec![1.0]),
            (1000, 1000, vec![0.013]),
            (1000, 1, vec![0.013]),
            (840, 35, vec![0.01, 0.5, 1e-3]),
            (777, 7, vec![0.02; 5]),
            // What values and scales below the normal ones give.
            (
                5000,
                1000,
                vec![f32::MIN_POSITIVE, 3e-38, 1e-36, 1e-35, 2e-31],
            ),
        ] {
            let mut x = activations(1, count, float, count as u64);
            if scales.len() == 5 && run == 1000 {
                x = (0..count)
                    .map(|_| round(tiny.signed() * 2e-38, float))
                    .collect();
            }
            let memory = device.upload(&to_bytes(&x, float));
            let device_scales = device.upload(&to_bytes(&scales, Float::F32));
            let out = device.upload(&vec![POISON; count * float.size()]);
            let args = FakeQuantize {
                count,
                x: memory.slice(),
                float,
                scales: device_scales.slice(),
                scale_count: scales.len(),
                run,
                out: out.slice(),
            };
            metal::fake_quantize(&device, &args).unwrap();
            let found = from_bytes(&device.download(&out), float);
            let scale = |i: usize| scales[i / run % scales.len()];
            let expected = x
                .iter()
                .enumerate()
                .map(|(i, &x)| cpu::fake_quantize(x, scale(i)));
            let expected: Vec<f32> = expected.map(|value| round(value, float)).collect();
            assert_same(
                &found,
                &expected,
                &format!("{count} of {float:?}, {run}, {scales:?}"),
            );
            device.clear();
        }
    }
    device.assert_all_launched("fake_quantize_");
}
