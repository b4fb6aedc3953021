//! Decoding and encoding, exactly: all codes, all BF16 and F16 values, and many F32 ones.

use crate::cases::{Random, code_bits, fnv, values};
use crate::devices::everywhere;
use crate::oracle;
use candle_core::{DType, Device, Result, Tensor};
use candle_kernels_fp8::e4m3;
use half::{bf16, f16};

/// Checks one f32 against the oracle.
#[track_caller]
fn check(value: f32) {
    let (found, expected) = (e4m3::encode(value), oracle::encode(f64::from(value)));
    assert_eq!(
        found, expected,
        "{value:e} became {found:#04x}, expected {expected:#04x}"
    );
}

#[test]
fn decodes_every_code() {
    for code in 0..=255u8 {
        let (found, expected) = (e4m3::decode(code), oracle::decode(code));
        if expected.is_nan() {
            assert!(found.is_nan(), "{code:#04x}");
        } else {
            assert_eq!(
                f64::from(found).to_bits(),
                expected.to_bits(),
                "{code:#04x}"
            );
        }
    }
}

/// PyTorch 2.14 gives these for `x.float().clamp(-448, 448).to(float8_e4m3fn)`, over bit patterns 0 to 0xffff.
const TORCH_BF16: u64 = 0xf9de_a88c_05be_79a5;
const TORCH_F16: u64 = 0x2d72_4a81_49ff_1225;

#[test]
fn encodes_every_bf16() -> Result<()> {
    let all: Vec<bf16> = (0..=u16::MAX).map(bf16::from_bits).collect();
    for x in &all {
        check(x.to_f32());
    }
    let x = Tensor::new(all, &Device::Cpu)?;
    let found = code_bits(&candle_fp8::quantize_static(&x, 1.0)?)?;
    assert_eq!(fnv(found.iter().copied()), TORCH_BF16);
    everywhere(|device| {
        let x = x.to_device(device)?;
        for codes in [
            candle_fp8::quantize_static(&x, 1.0)?,
            candle_fp8::cast(&x, DType::F8E4M3)?,
        ] {
            let codes = code_bits(&codes)?;
            let differ = |(a, b): (&u8, &u8)| a != b && (a & 0x7f, b & 0x7f) != (0x7f, 0x7f);
            assert!(!codes.iter().zip(&found).any(differ));
        }
        Ok(())
    })
}

#[test]
fn encodes_every_f16() -> Result<()> {
    let all: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).collect();
    for x in &all {
        check(x.to_f32());
    }
    let x = Tensor::new(all, &Device::Cpu)?;
    let found = code_bits(&candle_fp8::quantize_static(&x, 1.0)?)?;
    assert_eq!(fnv(found.iter().copied()), TORCH_F16);
    everywhere(|device| {
        let x = x.to_device(device)?;
        for codes in [
            candle_fp8::quantize_static(&x, 1.0)?,
            candle_fp8::cast(&x, DType::F8E4M3)?,
        ] {
            let codes = code_bits(&codes)?;
            let differ = |(a, b): (&u8, &u8)| a != b && (a & 0x7f, b & 0x7f) != (0x7f, 0x7f);
            assert!(!codes.iter().zip(&found).any(differ));
        }
        Ok(())
    })
}

#[test]
fn encodes_f32_at_random() {
    let mut random = Random(1);
    for _ in 0..200_000 {
        // Any bit pattern, then one in the range of the codes.
        check(f32::from_bits(random.bits()));
        check(random.signed() * 2f32.powi((random.bits() % 24) as i32 - 13));
    }
}

#[test]
fn encodes_ties_and_their_neighbours() {
    for code in 0..0x7eu8 {
        // The middle between two codes has one bit more than they do.
        let tie = ((oracle::decode(code) + oracle::decode(code + 1)) / 2.0) as f32;
        let even = code + (code & 1);
        assert_eq!(e4m3::encode(tie), even);
        assert_eq!(e4m3::encode(-tie), even | 0x80);
        for value in [tie, tie.next_up(), tie.next_down()] {
            check(value);
            check(-value);
        }
    }
}

#[test]
fn saturates_and_keeps_nan_and_zero() {
    for (value, code) in [
        (448.0, 0x7e),
        (464.0, 0x7e), // Halfway to 480, which E4M3 does not have.
        (1e30, 0x7e),
        (f32::INFINITY, 0x7e),
        (f32::NEG_INFINITY, 0xfe),
        (0.0, 0x00),
        (-0.0, 0x80),
        (f32::from_bits(0x7fc0_0000), 0x7f),
        (f32::from_bits(0xffc0_0000), 0xff),
        (f32::from_bits(0x7f80_0001), 0x7f), // A signalling NaN whose high bits are zero.
        (f32::MIN_POSITIVE, 0x00),
        (-f32::from_bits(1), 0x80),
    ] {
        assert_eq!(e4m3::encode(value), code, "{value:e}");
        assert_eq!(oracle::encode(f64::from(value)), code, "{value:e}");
    }
}

#[test]
fn round_trips_through_candle() -> Result<()> {
    // Candle's own cast decodes the same values, so tensors of codes mean the same to both.
    let all: Vec<u8> = (0..=255).collect();
    let cast = crate::cases::codes(&all, 256, &Device::Cpu)?.to_dtype(DType::F32)?;
    for (code, value) in all.into_iter().zip(cast.to_vec1::<f32>()?) {
        assert!(value == e4m3::decode(code) || (value.is_nan() && code & 0x7f == 0x7f));
    }
    Ok(())
}

#[test]
fn casts_of_codes_are_exact() -> Result<()> {
    let all: Vec<u8> = (0..=255).collect();
    everywhere(|device| {
        let codes = crate::cases::codes(&all, (16, 16), device)?;
        let column = |i: usize| all[i % 16 * 16 + i / 16];
        for dtype in [DType::BF16, DType::F16, DType::F32] {
            let cast = candle_fp8::cast(&codes, dtype)?;
            assert_eq!((cast.dims(), cast.dtype()), (&[16, 16][..], dtype));
            for (&code, value) in all.iter().zip(values(&cast)?) {
                let expected = oracle::decode(code);
                assert!(value == expected || value.is_nan() && expected.is_nan());
            }
            // There and back, and in another order.
            let back = candle_fp8::cast(&cast, DType::F8E4M3)?;
            let transposed = candle_fp8::cast(&codes.t()?, dtype)?;
            let back_transposed = candle_fp8::cast(&cast.t()?, DType::F8E4M3)?;
            let order: Vec<u8> = (0..256).map(column).collect();
            for (codes, expected) in [(&back, &all), (&back_transposed, &order)] {
                for (found, expected) in code_bits(codes)?.into_iter().zip(expected) {
                    assert!(found == *expected || found & expected & 0x7f == 0x7f);
                }
            }
            for (value, code) in values(&transposed)?.into_iter().zip(&order) {
                let expected = oracle::decode(*code);
                assert!(value == expected || value.is_nan() && expected.is_nan());
            }
        }
        // Nothing to do, and nothing of ours.
        assert_eq!(
            candle_fp8::cast(&codes, DType::F8E4M3)?.dtype(),
            DType::F8E4M3
        );
        let wide = Tensor::new(&[1f32, 1e30], device)?;
        let half = candle_fp8::cast(&wide, DType::F16)?;
        assert_eq!(values(&half)?, [1.0, f64::INFINITY]);
        Ok(())
    })
}

#[test]
fn casts_of_other_dtypes_are_refused() -> Result<()> {
    let x = Tensor::new(&[1f64], &Device::Cpu)?;
    let text = candle_fp8::cast(&x, DType::F8E4M3).unwrap_err().to_string();
    assert!(text.contains("cast: x has dtype F64"), "{text}");
    let x = x.to_dtype(DType::F32)?;
    let text = candle_fp8::cast(&x, DType::U8).unwrap_err().to_string();
    assert!(text.contains("cast: the result has dtype U8"), "{text}");
    Ok(())
}
