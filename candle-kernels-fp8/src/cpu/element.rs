//! The float types of tensors, widened and rounded without branches: loops over them become vector instructions.

use half::{bf16, f16};

/// A float type of activations, weights and scales.
pub trait Element: Copy + Default + Send + Sync + 'static {
    /// Rounds to nearest, ties to even; NaN stays NaN.
    fn from_f32(value: f32) -> Self;
    /// Exact.
    fn to_f32(self) -> f32;
}

impl Element for f32 {
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }

    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        let bits = value.to_bits();
        let even = (bits >> 16) & 1;
        let rounded = bits.wrapping_add(0x7fff + even) >> 16;
        let quiet = (bits >> 16) | 0x40;
        Self::from_bits(if value.is_nan() { quiet } else { rounded } as u16)
    }

    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

/// Bits that f32's mantissa has more than f16's.
const SHORTER: u32 = 13;
/// What f32 adds to an exponent more than f16 does, as bits of an f32.
const REBIAS: u32 = (127 - 15) << 23;

impl Element for f16 {
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        let bits = value.to_bits();
        let sign = (bits >> 16) & 0x8000;
        let magnitude = bits & 0x7fff_ffff;
        let even = (magnitude >> SHORTER) & 1;
        let rounded = magnitude.wrapping_add(0xfff + even);
        let normal = rounded.wrapping_sub(REBIAS) >> SHORTER;
        // Beside 0.5, the last bit of an f32 is the step of f16's subnormals: the addition rounds to it.
        let subnormal = (f32::from_bits(magnitude) + 0.5)
            .to_bits()
            .wrapping_sub(0.5f32.to_bits());
        let quiet = 0x7e00 | (magnitude >> SHORTER) & 0x3ff;
        let result = match magnitude {
            m if m < 0x3880_0000 => subnormal,
            m if m < 0x4780_0000 => normal,
            m if m <= 0x7f80_0000 => 0x7c00,
            _ => quiet,
        };
        Self::from_bits((sign | result) as u16)
    }

    #[inline(always)]
    fn to_f32(self) -> f32 {
        let bits = u32::from(self.to_bits());
        let sign = (bits & 0x8000) << 16;
        let magnitude = (bits & 0x7fff) << SHORTER;
        // 2^112: exact, and makes subnormals normal.
        let finite = (f32::from_bits(magnitude) * f32::from_bits((127 + 112) << 23)).to_bits();
        let special = magnitude | 0x7f80_0000;
        let is_special = bits & 0x7c00 == 0x7c00;
        f32::from_bits(sign | if is_special { special } else { finite })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widening_agrees_with_half_on_every_value() {
        for bits in 0..=u16::MAX {
            let (b, h) = (bf16::from_bits(bits), f16::from_bits(bits));
            for (found, expected) in [
                (Element::to_f32(b), b.to_f32()),
                (Element::to_f32(h), h.to_f32()),
            ] {
                let same = found.to_bits() == expected.to_bits();
                assert!(same || found.is_nan() && expected.is_nan(), "{bits:#x}");
            }
        }
    }

    #[test]
    fn rounding_agrees_with_half() {
        // Every f16 and bf16, what lies next to it, and what lies halfway to its neighbour, among them all the ties.
        let corners = (0..=u16::MAX).flat_map(|bits| {
            let h = f16::from_bits(bits).to_f32().to_bits();
            let b = u32::from(bits) << 16;
            [h, h ^ 0x1000, b, b ^ 0x8000]
                .into_iter()
                .flat_map(|bits| [bits.wrapping_sub(1), bits, bits.wrapping_add(1)])
        });
        let sweep = (0..=u32::MAX).step_by(4999);
        for bits in corners.chain(sweep) {
            let value = f32::from_bits(bits);
            let b: bf16 = Element::from_f32(value);
            let h: f16 = Element::from_f32(value);
            let same = b.to_bits() == bf16::from_f32(value).to_bits();
            assert!(same, "bf16 of {value:e}: {b}");
            let same = h.to_bits() == f16::from_f32(value).to_bits();
            assert!(same, "f16 of {value:e}: {h}");
        }
    }
}
