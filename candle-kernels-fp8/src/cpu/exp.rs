//! The exponential function, as arithmetic that vectorizes and gives the same bits on every instruction set.

/// Where the next f32 is 1 apart: adding it rounds to a whole number, which is then in the low bits.
const WHOLE: f32 = 1.5 * (1 << 23) as f32;
/// ln 2 in two parts. The first has nine significant bits: its product with the power of two is exact.
const LN_2_HIGH: f32 = 0.693_359_4;
const LN_2_LOW: f32 = (std::f64::consts::LN_2 - 0.693_359_375) as f32;

/// e^x with an error of at most 2 ulp, subnormal results included; infinity above 88.73, 0 below −104, NaN of NaN.
///
/// e^x = 2^n · e^r with |r| ≤ ln 2 / 2; e^r is its Taylor polynomial, whose remainder is below r^8 / 8! = 5.2e-9.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // Beyond these the result is 0 or infinity. NaN is neither larger nor smaller and stays.
    let x = if x > 89.0 { 89.0 } else { x };
    let x = if x < -104.0 { -104.0 } else { x };
    let whole = x * std::f32::consts::LOG2_E + WHOLE;
    let n = whole - WHOLE;
    let r = (x - n * LN_2_HIGH) - n * LN_2_LOW;
    let mut p = 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    let y = (p * (r * r) + r) + 1.0;
    // 2^n in two factors, each of them normal where n is from -150 to 129.
    let n = whole.to_bits().wrapping_sub(WHOLE.to_bits()) as i32;
    let half = n >> 1;
    let power = |n: i32| f32::from_bits((n.wrapping_add(127) as u32) << 23);
    y * power(half) * power(n.wrapping_sub(half))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Distance in steps of f32 at the exact value.
    fn ulps(found: f32, exact: f64) -> f64 {
        let exponent = exact.log2().floor().max(-126.0) as i32;
        (f64::from(found) - exact).abs() / 2f64.powi(exponent - 23)
    }

    #[test]
    fn at_most_two_ulps_off() {
        let mut largest = 0f64;
        let steps = 20_000_000;
        for i in 0..=steps {
            let x = -104.0 + 192.72 * (f64::from(i) / f64::from(steps));
            let x = x as f32;
            let off = ulps(exp(x), f64::from(x).exp());
            assert!(off <= 2.0, "exp({x}) = {}, {off} ulp off", exp(x));
            largest = largest.max(off);
        }
        // Small arguments, of both signs.
        for exponent in -149..3 {
            for sign in [1.0, -1.0] {
                let x = (sign * 1.37 * 2f64.powi(exponent)) as f32;
                assert!(ulps(exp(x), f64::from(x).exp()) <= 2.0, "exp({x})");
            }
        }
        println!("largest error: {largest:.2} ulp");
    }

    #[test]
    fn the_ends() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-0.0), 1.0);
        for x in [88.73, 89.0, 1e4, f32::MAX, f32::INFINITY] {
            assert_eq!(exp(x), f32::INFINITY, "{x}");
        }
        assert!(exp(88.72).is_finite());
        for x in [-104.0, -1e4, f32::MIN, f32::NEG_INFINITY] {
            assert_eq!(exp(x).to_bits(), 0, "{x}");
        }
        assert!(exp(-103.0) > 0.0);
        assert!(exp(f32::NAN).is_nan() && exp(-f32::NAN).is_nan());
    }
}
