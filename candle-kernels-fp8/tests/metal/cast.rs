//! Casts, bit by bit, and padding.

use candle_kernels_fp8::e4m3;
use candle_kernels_fp8::metal::{self, Float};
use half::{bf16, f16};

use crate::emulator::Emulator;
use crate::oracle;
use crate::oracle::cases::Random;
use crate::values::{
    FLOATS, POISON, apart, assert_same, assert_same_codes, from_bytes, lengths, to_bytes,
};

fn encode(device: &Emulator, bytes: &[u8], float: Float) -> Vec<u8> {
    let count = bytes.len() / float.size();
    let (from, to) = (device.upload(bytes), device.upload(&vec![POISON; count]));
    metal::cast_to_e4m3(device, (from.slice(), float), to.slice(), count).unwrap();
    device.download(&to)
}

fn decode(device: &Emulator, codes: &[u8], float: Float) -> Vec<f32> {
    let room = vec![POISON; codes.len() * float.size()];
    let (from, to) = (device.upload(codes), device.upload(&room));
    metal::cast_from_e4m3(device, from.slice(), (to.slice(), float), codes.len()).unwrap();
    from_bytes(&device.download(&to), float)
}

#[test]
fn every_value_of_16_bits() {
    let Some(device) = Emulator::get() else {
        return;
    };
    for float in [Float::Bf16, Float::F16] {
        let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        let value = |bits| match float {
            Float::Bf16 => bf16::from_bits(bits).to_f64(),
            _ => f16::from_bits(bits).to_f64(),
        };
        let expected: Vec<u8> = (0..=u16::MAX)
            .map(|bits| oracle::encode(value(bits)))
            .collect();
        assert_same_codes(
            &encode(&device, &bytes, float),
            &expected,
            &format!("{float:?}"),
        );
    }
}

#[test]
fn values_of_32_bits() {
    let Some(device) = Emulator::get() else {
        return;
    };
    // Next to every code and every middle of two, and any bits.
    let mut values = Vec::new();
    for code in 0..0x7eu8 {
        let (low, high) = (e4m3::decode(code), e4m3::decode(code + 1));
        for middle in [low, (low + high) / 2.0] {
            for step in 0..5 {
                let bits = middle.to_bits().saturating_add(step).saturating_sub(2);
                values.extend([f32::from_bits(bits), -f32::from_bits(bits)]);
            }
        }
    }
    let mut random = Random(5);
    values.extend((0..100_000).map(|_| f32::from_bits(random.bits())));
    values.extend([f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY]);
    let expected: Vec<u8> = values.iter().map(|&value| e4m3::encode(value)).collect();
    let found = encode(&device, &to_bytes(&values, Float::F32), Float::F32);
    assert_same_codes(&found, &expected, "F32");
}

#[test]
fn every_code() {
    let Some(device) = Emulator::get() else {
        return;
    };
    let codes: Vec<u8> = (0..=255).collect();
    let expected: Vec<f32> = codes
        .iter()
        .map(|&code| oracle::decode(code) as f32)
        .collect();
    for float in FLOATS {
        assert_same(
            &decode(&device, &codes, float),
            &expected,
            &format!("{float:?}"),
        );
    }
}

#[test]
fn every_length() {
    let Some(device) = Emulator::get() else {
        return;
    };
    let mut random = Random(6);
    for count in lengths().chain([0, 2047, 2048, 2049, 10_001]) {
        let float = FLOATS[count % 3];
        let codes: Vec<u8> = (0..count).map(|_| random.finite_code()).collect();
        let values: Vec<f32> = codes.iter().map(|&code| e4m3::decode(code)).collect();
        let what = format!("{count} of {float:?}");
        assert_same(&decode(&device, &codes, float), &values, &what);
        assert_same_codes(
            &encode(&device, &to_bytes(&values, float), float),
            &codes,
            &what,
        );
        device.clear();
    }
    device.assert_all_launched("cast_");
}

#[test]
fn rows_are_padded() {
    let Some(device) = Emulator::get() else {
        return;
    };
    let mut random = Random(7);
    for k in lengths() {
        for (rows, stride) in [(1, k), (3, k), (5, k.next_multiple_of(16)), (2, k + 7)] {
            let from: Vec<u8> = (0..rows * k).map(|_| random.bits() as u8).collect();
            let to = metal::padded(k);
            let memory = device.upload(&apart(&from, k, stride));
            let padded = device.upload(&vec![POISON; rows * to]);
            let input = (memory.slice(), stride);
            metal::pad_rows(&device, input, padded.slice(), (rows, k)).unwrap();
            let mut expected = Vec::new();
            for row in from.chunks(k) {
                expected.extend(row);
                expected.resize(expected.len().next_multiple_of(to), 0);
            }
            assert_eq!(
                device.download(&padded),
                expected,
                "{rows} rows of {k}, stride {stride}"
            );
        }
        device.clear();
    }
    device.assert_all_launched("pad_");
}
