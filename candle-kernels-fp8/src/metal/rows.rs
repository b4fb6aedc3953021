//! Where kernels write rows of activations.

use super::launch::{copies, threads_for, word};
use super::{Binding, Slice};

/// Where rows `[m, k]` go, and as what.
#[derive(Debug)]
pub enum Output<'a, B> {
    /// As values of the activations' type.
    Values {
        /// Receives the values.
        values: Slice<'a, B>,
        /// Elements from one row to the next, at least `k`. What lies between rows is left alone.
        stride: usize,
    },
    /// As E4M3.
    Codes {
        /// Receives the codes.
        codes: Slice<'a, B>,
        /// Bytes from one row to the next, at least `k`. What lies between rows, and behind the last one, becomes zero.
        stride: usize,
        /// The scales that values are divided by.
        quantization: Quantization<'a, B>,
    },
}

/// How rows `[m, k]` are quantized: scale = amax / 448 and code = `encode(x / scale)`, as on the CPU
/// ([`quantize_groups`](crate::cpu::quantize_groups) says what becomes of zeros, NaN and infinities).
#[derive(Debug)]
pub enum Quantization<'a, B> {
    /// With a scale for each row.
    Token {
        /// Receives `[m]`, F32.
        scales: Slice<'a, B>,
    },
    /// With a scale for each `group` neighbours of a row.
    Group {
        /// Not 0.
        group: usize,
        /// Receives `[m, ceil(k / group)]`, F32.
        scales: Slice<'a, B>,
    },
    /// With a scale that is given.
    Static {
        /// Positive and finite.
        scale: f32,
        /// Receives it, F32 `[1]`, if there are rows.
        scales: Slice<'a, B>,
    },
}

copies!(Output Quantization);

/// The modes of `kernels/rows.h`.
const VALUES: u32 = 0;
const TOKEN: u32 = 1;
const NEIGHBORS: u32 = 2;
const STATIC: u32 = 3;
const TENSOR: u32 = 4;

/// Threads of a row, at most.
const MOST_THREADS: usize = 256;

pub(super) fn threads(k: usize) -> usize {
    threads_for(k, MOST_THREADS)
}

impl<'a, B> Output<'a, B> {
    /// Device twin: `Output` in `kernels/rows.h`.
    ///
    /// # Panics
    /// If `k` or a group is 0, a stride is below `k`, or a scale is not positive and finite.
    pub(super) fn words(&self, k: usize) -> [u32; 6] {
        assert!(k > 0, "rows are not empty");
        let (stride, mode, neighbors, scale) = match *self {
            Self::Values { stride, .. } => (stride, VALUES, 0, 0.0),
            Self::Codes {
                stride,
                quantization,
                ..
            } => match quantization {
                Quantization::Token { .. } => (stride, TOKEN, 0, 0.0),
                Quantization::Group { group, .. } => {
                    assert!(group > 0, "groups are not empty");
                    // Past the row's end there is nothing to share a scale with.
                    (stride, NEIGHBORS, group.min(k), 0.0)
                }
                Quantization::Static { scale, .. } => {
                    let sound = scale > 0.0 && scale.is_finite();
                    assert!(sound, "a scale is positive and finite");
                    (stride, STATIC, 0, scale)
                }
            },
        };
        assert!(stride >= k, "rows fit their stride");
        [
            word(k),
            word(stride),
            mode,
            word(neighbors),
            scale.to_bits(),
            0,
        ]
    }

    /// What is written, and where scales go; another buffer stands in for them where there are none.
    pub(super) fn bindings(&self) -> [Binding<'a, B>; 2] {
        let (to, scales) = match *self {
            Self::Values { values, .. } => (
                values,
                Slice {
                    offset: 0,
                    ..values
                },
            ),
            Self::Codes {
                codes,
                quantization,
                ..
            } => match quantization {
                Quantization::Token { scales }
                | Quantization::Group { scales, .. }
                | Quantization::Static { scales, .. } => (codes, scales),
            },
        };
        [to, scales].map(Binding::Write)
    }
}

/// As [`Output::words`], for one scale of all rows, whose largest magnitude is that of so many partial ones.
pub(super) fn tensor_words(k: usize, stride: usize, magnitudes: usize) -> [u32; 6] {
    assert!(
        stride >= k && k > 0,
        "rows are not empty and fit their stride"
    );
    [word(k), word(stride), TENSOR, 0, 0, word(magnitudes)]
}
