//! Casts, bit by bit, and padding.

use candle_kernels_fp8::cuda::{self, Float};
use candle_kernels_fp8::e4m3;
use half::{bf16, f16};

use crate::lengths;
use crate::oracle::cases::Random;
use crate::rows::{FLOATS, POISON, assert_same, from_bytes, to_bytes};
use crate::support_cuda::Device;

/// Casts values that start `shift` elements past a multiple of 16 bytes.
fn encode(device: &Device, bytes: &[u8], float: Float, shift: usize) -> Vec<u8> {
    let count = bytes.len() / float.size();
    let mut shifted = vec![0xff; shift * float.size()];
    shifted.extend(bytes);
    let from = device.upload(&shifted);
    let codes = device.upload(&vec![POISON; count]);
    let values = (from.address + (shift * float.size()) as u64, float);
    // SAFETY: the memory is as large as the sizes say.
    unsafe { cuda::cast_to_e4m3(&device.stream, values, codes.address, count, false) }.unwrap();
    device.download(&codes).unwrap()
}

/// Whether a code is that of a value; the GPU does not keep the sign of NaN.
fn encodes(code: u8, value: f32) -> bool {
    match value.is_nan() {
        true => code & 0x7f == 0x7f,
        false => code == e4m3::encode(value),
    }
}

/// As [`encode`], back.
fn decode(device: &Device, codes: &[u8], float: Float, shift: usize) -> Vec<f32> {
    let mut shifted = vec![0x7f; shift];
    shifted.extend(codes);
    let from = device.upload(&shifted);
    let values = device.upload(&vec![POISON; codes.len() * float.size()]);
    let (stream, to) = (&device.stream, (values.address, float));
    let address = from.address + shift as u64;
    // SAFETY: as above.
    unsafe { cuda::cast_from_e4m3(stream, address, to, codes.len(), true) }.unwrap();
    from_bytes(&device.download(&values).unwrap(), float)
}

#[test]
fn every_value_of_16_bits() {
    let Some(device) = Device::get() else { return };
    for float in [Float::Bf16, Float::F16] {
        let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        for (bits, code) in (0..=u16::MAX).zip(encode(&device, &bytes, float, 0)) {
            let value = match float {
                Float::Bf16 => bf16::from_bits(bits).to_f32(),
                _ => f16::from_bits(bits).to_f32(),
            };
            assert!(
                encodes(code, value),
                "{float:?} {bits:#x}, {value:e}: {code:#x}"
            );
        }
    }
}

#[test]
fn values_of_32_bits() {
    let Some(device) = Device::get() else { return };
    // Next to every code and every middle of two, and any bits.
    let mut values = Vec::new();
    for code in 0..0x7eu8 {
        for middle in [
            e4m3::decode(code),
            (e4m3::decode(code) + e4m3::decode(code + 1)) / 2.0,
        ] {
            for step in 0..5 {
                let bits = middle.to_bits().saturating_add(step).saturating_sub(2);
                values.extend([f32::from_bits(bits), -f32::from_bits(bits)]);
            }
        }
    }
    let mut random = Random(5);
    values.extend((0..100_000).map(|_| f32::from_bits(random.bits())));
    values.extend([
        f32::NAN,
        -f32::NAN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::MAX,
        -f32::MAX,
    ]);
    let bytes: Vec<u8> = values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    for (value, code) in values.iter().zip(encode(&device, &bytes, Float::F32, 0)) {
        assert!(encodes(code, *value), "{value:e}: {code:#x}");
    }
}

#[test]
fn every_code() {
    let Some(device) = Device::get() else { return };
    let codes: Vec<u8> = (0..=255).collect();
    let expected: Vec<f32> = codes.iter().map(|&code| e4m3::decode(code)).collect();
    for float in FLOATS {
        for shift in [0, 3] {
            let found = decode(&device, &codes, float, shift);
            assert_same(&found, &expected, &format!("{float:?}"));
        }
    }
}

#[test]
fn every_length() {
    let Some(device) = Device::get() else { return };
    let mut random = Random(6);
    for count in [0]
        .into_iter()
        .chain(lengths())
        .chain([8191, 8192, 8193, 100_001])
    {
        let float = FLOATS[count % 3];
        let codes: Vec<u8> = (0..count).map(|_| random.finite_code()).collect();
        let values: Vec<f32> = codes.iter().map(|&code| e4m3::decode(code)).collect();
        for shift in [0, 1, 8] {
            let found = decode(&device, &codes, float, shift);
            assert_same(&found, &values, &format!("{count} of {float:?}"));
            let found = encode(&device, &to_bytes(&values, float), float, shift);
            assert!(found == codes, "{count} of {float:?}");
        }
    }
}

#[test]
fn rows_are_padded() {
    let Some(device) = Device::get() else { return };
    let mut random = Random(7);
    for k in lengths() {
        for (rows, stride) in [(1, k), (3, k), (5, k.next_multiple_of(16)), (2, k + 7)] {
            let from: Vec<u8> = (0..rows * stride).map(|_| random.bits() as u8).collect();
            let to = cuda::padded(k);
            let memory = device.upload(&from);
            let padded = device.upload(&vec![POISON; rows * to]);
            let (stream, input) = (&device.stream, (memory.address, stride));
            // SAFETY: the memory is as large as the sizes say.
            unsafe { cuda::pad_rows(stream, input, padded.address, (rows, k), false) }.unwrap();
            let found = device.download(&padded).unwrap();
            for (found, from) in found.chunks(to).zip(from.chunks(stride)) {
                assert!(
                    found[..k] == from[..k],
                    "{rows} rows of {k}, stride {stride}"
                );
                assert!(
                    found[k..].iter().all(|&byte| byte == 0),
                    "no zeros behind {k}"
                );
            }
        }
    }
}
