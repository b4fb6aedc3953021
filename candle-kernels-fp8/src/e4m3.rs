//! E4M3 as compressed-tensors, PyTorch (`float8_e4m3fn`) and the GPU makers write it: 1 sign bit, 4 exponent bits with
//! bias 7, 3 mantissa bits; no infinities; NaN is `S.1111.111` alone, so the largest finite value is `S.1111.110`, 448.

/// The largest finite value.
pub const MAX: f32 = 448.0;

/// Every code's value.
static VALUES: [f32; 256] = {
    let mut values = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        values[code] = widen(code as u8);
        code += 1;
    }
    values
};

/// The value of a code, exactly. Codes `0x7f` and `0xff` are NaN.
#[inline]
pub fn decode(code: u8) -> f32 {
    VALUES[usize::from(code)]
}

/// As [`decode`], by arithmetic instead of a table: the form that the compiler turns into vector instructions when it
/// stands in a loop.
#[inline(always)]
pub(crate) const fn widen(code: u8) -> f32 {
    let sign = (code as u32 & 0x80) << 24;
    let magnitude = code as u32 & 0x7f;
    // A normal code holds its exponent and mantissa where f32 has them, 20 bits further down and with bias 7, not 127.
    let normal = (magnitude << 20) + (120 << 23);
    // A subnormal code counts steps of 2^-9. Under the exponent of 2^-6 the steps are the mantissa's top bits, and
    // taking 2^-6 away again is exact. (Multiplying an f32 subnormal would be shorter, but is slow on some processors
    // and wrong where subnormals are flushed to zero.)
    let steps = f32::from_bits((magnitude << 20) | (121 << 23)) - f32::from_bits(121 << 23);
    let bits = if magnitude < 0x08 {
        steps.to_bits()
    } else {
        normal
    };
    let bits = if magnitude == 0x7f { 0x7fc0_0000 } else { bits };
    f32::from_bits(bits | sign)
}

/// The code nearest to a value; of two equally near ones the even one.
///
/// Values beyond ±448, the infinities included, become ±448. NaN becomes the NaN of the same sign. Zero keeps its sign.
#[inline(always)]
pub fn encode(value: f32) -> u8 {
    let bits = value.to_bits();
    let sign = (bits >> 24) & 0x80;
    let magnitude = bits & 0x7fff_ffff;
    let clamped = magnitude.min(MAX.to_bits());
    // Below 2^-6 codes are multiples of 2^-9, which is what adding 2^14 rounds an f32 to, ties to even.
    const SHIFT: f32 = 16384.0;
    let subnormal = (f32::from_bits(clamped) + SHIFT).to_bits() - SHIFT.to_bits();
    // From there on, 3 of the 23 mantissa bits stay. A carry out of the mantissa raises the exponent, as it should.
    let rounded = clamped + 0x7_ffff + ((clamped >> 20) & 1);
    let normal = (rounded >> 20).wrapping_sub(120 << 3);
    // Chosen without branches, so that loops over this become vector instructions.
    let code = if clamped < 0x3c80_0000 {
        subnormal
    } else {
        normal
    };
    let code = if magnitude > f32::INFINITY.to_bits() {
        0x7f
    } else {
        code
    };
    (sign | code) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn landmarks() {
        for (code, value) in [
            (0x00, 0.0),
            (0x01, 1.0 / 512.0),
            (0x07, 7.0 / 512.0),
            (0x08, 1.0 / 64.0),
            (0x38, 1.0),
            (0x7e, 448.0),
            (0xbc, -1.5),
        ] {
            assert_eq!(decode(code), value);
            assert_eq!(encode(value), code);
        }
        assert!(decode(0x7f).is_nan() && decode(0xff).is_nan());
        assert_eq!(encode(-0.0), 0x80);
    }

    #[test]
    fn table_and_arithmetic_agree() {
        for code in 0..=255u8 {
            assert_eq!(decode(code).to_bits(), widen(code).to_bits());
        }
    }
}
