//! The oracle: FP8 arithmetic written from the format, in f64, as plainly as it goes. It imports nothing of ours.
//!
//! Where the definition itself says f32 (scales, the quotient that becomes a code), the f64 result is rounded to f32:
//! for one division or product of f32 values that is the correctly rounded one.
#![allow(dead_code)] // Each test binary uses its own part.

mod adder;
pub(crate) mod cases;
pub(crate) mod token;

pub(crate) use adder::Adder;

/// The value of an E4M3 code: sign, 4 exponent bits with bias 7, 3 mantissa bits; `S.1111.111` is NaN.
pub(crate) fn decode(code: u8) -> f64 {
    let sign = if code & 0x80 == 0 { 1.0 } else { -1.0 };
    let exponent = i32::from((code >> 3) & 0xf);
    let mantissa = f64::from(code & 0x7);
    match (exponent, code & 0x7) {
        (15, 7) => f64::NAN,
        (0, _) => sign * mantissa * 2f64.powi(-9),
        _ => sign * (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7),
    }
}

/// The E4M3 code of a value: clamp to ±448, then the nearest of all codes, the even one of two. NaN keeps its sign.
pub(crate) fn encode(value: f64) -> u8 {
    let sign = if value.is_sign_negative() { 0x80 } else { 0 };
    if value.is_nan() {
        return sign | 0x7f;
    }
    let value = value.abs().min(448.0);
    let mut best = (value, 0u8);
    for code in 1..0x7f {
        let distance = (decode(code) - value).abs();
        if distance < best.0 || (distance == best.0 && code & 1 == 0) {
            best = (distance, code);
        }
    }
    sign | best.1
}

/// A binary float type, for rounding to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Float {
    /// 8 significant bits, the exponents of f32.
    Bf16,
    /// 11 significant bits, exponents from -14 to 15.
    F16,
    /// 24 significant bits.
    F32,
}

impl Float {
    /// Significant bits, the implicit one included.
    pub(crate) fn precision(self) -> i32 {
        match self {
            Self::Bf16 => 8,
            Self::F16 => 11,
            Self::F32 => 24,
        }
    }

    /// Exponent of the smallest normal value.
    fn min_exponent(self) -> i32 {
        match self {
            Self::F16 => -14,
            Self::Bf16 | Self::F32 => -126,
        }
    }

    /// The largest finite value.
    pub(crate) fn max(self) -> f64 {
        let max_exponent = if self == Self::F16 { 15 } else { 127 };
        (2.0 - 2f64.powi(1 - self.precision())) * 2f64.powi(max_exponent)
    }

    /// The smallest step: that of the subnormals.
    pub(crate) fn min_step(self) -> f64 {
        2f64.powi(self.min_exponent() - self.precision() + 1)
    }

    /// Half the distance between neighbours, relative to a normal value, at most.
    pub(crate) fn unit_roundoff(self) -> f64 {
        2f64.powi(-self.precision())
    }

    /// The nearest value of the type, the even one of two; beyond the largest, infinity.
    pub(crate) fn round(self, value: f64) -> f64 {
        if value == 0.0 || !value.is_finite() {
            return value;
        }
        let exponent = (((value.to_bits() >> 52) & 0x7ff) as i32 - 1023).max(self.min_exponent());
        // Powers of two: dividing and multiplying by them is exact.
        let step = 2f64.powi(exponent - self.precision() + 1);
        let rounded = (value / step).round_ties_even() * step;
        if rounded.abs() > self.max() {
            return f64::INFINITY.copysign(value);
        }
        rounded
    }
}

/// How activations are quantized.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Mode {
    /// Not at all (W8A16).
    Full,
    /// A scale for each row.
    Token,
    /// One scale, from the values.
    Tensor,
    /// One scale, given.
    Static(f32),
    /// A scale for so many neighbours in a row.
    Group(usize),
}

/// How the weight's scales lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    /// One.
    Tensor,
    /// One for each row.
    Channel,
    /// One for each block of so many rows and columns.
    Block(usize, usize),
}

impl Layout {
    /// Rows and columns of the table of scales.
    pub(crate) fn grid(self, n: usize, k: usize) -> (usize, usize) {
        match self {
            Self::Tensor => (1, 1),
            Self::Channel => (n, 1),
            Self::Block(rows, cols) => (n.div_ceil(rows), k.div_ceil(cols)),
        }
    }

    /// Where the scale of weight `[n, k]` stands in the table.
    pub(crate) fn index(self, row: usize, col: usize, k: usize) -> usize {
        match self {
            Self::Tensor => 0,
            Self::Channel => row,
            Self::Block(rows, cols) => row / rows * k.div_ceil(cols) + col / cols,
        }
    }
}

/// The scale for values whose largest magnitude is `amax`: amax / 448, or 1/448 for zeros, never a subnormal f32.
pub(crate) fn scale(amax: f64) -> f64 {
    let amax = if amax == 0.0 { 1.0 } else { amax };
    let scale = Float::F32.round(amax / 448.0);
    if scale < 2f64.powi(-126) {
        2f64.powi(-126)
    } else {
        scale
    }
}

fn amax(values: impl Iterator<Item = f64>) -> f64 {
    values.fold(0.0, |a, v| {
        if a.is_nan() || v.is_nan() {
            f64::NAN
        } else {
            a.max(v.abs())
        }
    })
}

/// Activations `[m, k]` after quantization.
pub(crate) struct Quantized {
    /// `[m, k]`; none in [`Mode::Full`].
    pub(crate) codes: Vec<u8>,
    /// The scale of every activation, `[m, k]`; 1 in [`Mode::Full`].
    pub(crate) scales: Vec<f64>,
    /// The value of every code, or the activation itself, `[m, k]`.
    pub(crate) values: Vec<f64>,
}

/// Quantizes activations `[m, k]`.
pub(crate) fn quantize(x: &[f64], k: usize, mode: Mode) -> Quantized {
    let m = x.len() / k;
    let scale_at = |row: usize, col: usize| match mode {
        Mode::Full => 1.0,
        Mode::Static(scale) => f64::from(scale),
        Mode::Tensor => scale(amax(x.iter().copied())),
        Mode::Token => scale(amax(x[row * k..][..k].iter().copied())),
        Mode::Group(group) => {
            let start = col / group * group;
            let end = (start + group).min(k);
            scale(amax(x[row * k + start..row * k + end].iter().copied()))
        }
    };
    let mut scales = Vec::with_capacity(x.len());
    for row in 0..m {
        for col in 0..k {
            // A scale holds for a run: look it up again only where it can change.
            let same = match mode {
                Mode::Group(group) => col % group != 0,
                Mode::Token => col != 0,
                Mode::Full | Mode::Tensor | Mode::Static(_) => row + col != 0,
            };
            let scale = if same {
                *scales.last().unwrap()
            } else {
                scale_at(row, col)
            };
            scales.push(scale);
        }
    }
    if mode == Mode::Full {
        return Quantized {
            codes: Vec::new(),
            scales,
            values: x.to_vec(),
        };
    }
    let codes: Vec<u8> = x
        .iter()
        .zip(&scales)
        .map(|(x, scale)| encode(Float::F32.round(x / scale)))
        .collect();
    let values = codes.iter().map(|&code| decode(code)).collect();
    Quantized {
        codes,
        scales,
        values,
    }
}

/// A matrix product as it should be, and what it is made of.
pub(crate) struct Product {
    /// `[m, n]`.
    pub(crate) values: Vec<f64>,
    /// `Σ |x · w| · x_scale · w_scale + |bias|`, `[m, n]`: what rounding errors are relative to.
    pub(crate) magnitudes: Vec<f64>,
    /// `Σ |x · w|` without scales, `[m, n]`.
    pub(crate) unscaled: Vec<f64>,
    /// The root of `Σ (x · w · x_scale · w_scale)²`, `[m, n]`.
    pub(crate) norms: Vec<f64>,
}

/// `y[m, n] = Σ_k x[m, k] · x_scale · w[n, k] · w_scale + bias[n]`.
pub(crate) fn scaled_mm(
    x: &[f64],
    weight: &[u8],
    k: usize,
    weight_scale: &[f32],
    layout: Layout,
    mode: Mode,
    bias: Option<&[f64]>,
) -> Product {
    let n = weight.len() / k;
    let x = quantize(x, k, mode);
    let w: Vec<f64> = weight.iter().map(|&code| decode(code)).collect();
    let mut product = Product {
        values: Vec::new(),
        magnitudes: Vec::new(),
        unscaled: Vec::new(),
        norms: Vec::new(),
    };
    for (x, x_scales) in x.values.chunks_exact(k).zip(x.scales.chunks_exact(k)) {
        for (row, w) in w.chunks_exact(k).enumerate() {
            let (mut sum, mut magnitude, mut unscaled, mut squares) = (0.0, 0.0, 0.0, 0.0);
            for col in 0..k {
                let scale = x_scales[col] * f64::from(weight_scale[layout.index(row, col, k)]);
                let term = x[col] * w[col];
                sum += term * scale;
                magnitude += (term * scale).abs();
                unscaled += term.abs();
                squares += (term * scale).powi(2);
            }
            let bias = bias.map_or(0.0, |bias| bias[row]);
            product.values.push(sum + bias);
            product.magnitudes.push(magnitude + bias.abs());
            product.unscaled.push(unscaled);
            product.norms.push(f64::sqrt(squares));
        }
        debug_assert_eq!(product.values.len() % n, 0);
    }
    product
}

impl Product {
    /// How far from `values[i]` a kernel may be, after a cast to `out`.
    ///
    /// The kernel computes `Σ_segments (Σ x · w) · (x_scale · w_scale) + bias` in f32, each sum in any order. What a
    /// term meets on its way into the result, each time with a relative error of at most `u = 2^-24`: its product; the
    /// additions in its segment, at most one for each other column of it; the product of the scales; its application;
    /// one addition for each other segment; the bias. Every other segment has a column at least, so all this is at most
    /// `K + 3` roundings, and one more is left for this oracle's own f64. With `n = K + 4` of them, the error is at most
    /// `n·u / (1 - n·u)` of `Σ |x · w| · scales + |bias|`. A product of scales below f32's normal range is off by
    /// another 2^-150 for each unit of `Σ |x · w|`, and each term by 2^-150. What adds less exactly says so itself. Last
    /// comes half a step of the output's type.
    pub(crate) fn bound(&self, adder: Adder, i: usize, k: usize, out: Float) -> f64 {
        let roundings = (k as f64 + 4.0) * 2f64.powi(-24);
        let accumulation = roundings / (1.0 - roundings) * self.magnitudes[i];
        let underflow = 2f64.powi(-149) * (self.unscaled[i] + k as f64);
        let before_cast =
            accumulation + underflow + adder.error(k, self.magnitudes[i], self.norms[i]);
        match out {
            Float::F32 => before_cast,
            _ => {
                let largest = self.values[i].abs() + before_cast;
                before_cast + out.unit_roundoff() * largest + out.min_step()
            }
        }
    }

    /// Whether a result is as far from `values[i]` as it may be, at most. An unexpected NaN is not; at the edge of the
    /// output's type infinity is.
    pub(crate) fn fits(&self, i: usize, found: f64, bound: f64, out: Float) -> bool {
        let expected = self.values[i];
        if expected.is_nan() || bound.is_nan() {
            return found.is_nan();
        }
        let at_the_edge = expected.abs() + bound > out.max();
        at_the_edge && found == expected.signum() * f64::INFINITY
            || (found - expected).abs() <= bound
    }

    /// Compares the result, `[m, n]`, of an op that adds in f32. Says where it first leaves the bound.
    pub(crate) fn check(&self, found: &[f64], k: usize, out: Float) -> Result<(), String> {
        self.check_by(Adder::F32, found, k, out)
    }

    /// As [`Product::check`], of an op that adds in another way.
    pub(crate) fn check_by(
        &self,
        adder: Adder,
        found: &[f64],
        k: usize,
        out: Float,
    ) -> Result<(), String> {
        if found.len() != self.values.len() {
            return Err(format!(
                "{} results, expected {}",
                found.len(),
                self.values.len()
            ));
        }
        for (i, (&found, &expected)) in found.iter().zip(&self.values).enumerate() {
            let bound = self.bound(adder, i, k, out);
            if !self.fits(i, found, bound, out) {
                return Err(format!(
                    "result {i} is {found:e}, expected {expected:e} ± {bound:e}"
                ));
            }
        }
        Ok(())
    }
}

/// A weight dequantized as compressed-tensors does it: code times scale, rounded to the scale's type, then to another.
pub(crate) fn dequantize(
    codes: &[u8],
    k: usize,
    scales: &[f32],
    layout: Layout,
    scale_type: Float,
    out: Float,
) -> Vec<f64> {
    let value = |(i, &code): (usize, &u8)| {
        let scale = scales[layout.index(i / k, i % k, k)];
        // 4 significant bits times 24 at most: exact in f64.
        out.round(scale_type.round(decode(code) * f64::from(scale)))
    };
    codes.iter().enumerate().map(value).collect()
}
