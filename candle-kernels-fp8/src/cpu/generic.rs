//! Inner loops in portable Rust, shaped so that the compiler vectorizes them for any target.
//!
//! All sums are in f32. A sum of `len` terms runs in several lanes that are added up at the end, so it carries at most
//! `len + 1` roundings on any path, products included.

use crate::e4m3;

/// Independent partial sums of a dot product: enough to hide the latency of an addition.
const LANES: usize = 16;

/// Weight rows that [`dot_rows`] takes at once.
pub(super) const ROWS: usize = 4;

/// Partial sums for each of the [`ROWS`] rows.
const ROW_LANES: usize = 8;

/// Decodes codes to their values.
pub(super) fn decode(codes: &[u8], values: &mut [f32]) {
    for (value, &code) in values.iter_mut().zip(codes) {
        *value = e4m3::widen(code);
    }
}

/// `Σ codes[i] · x[i]`, decoding on the way: for a weight that is used once.
pub(super) fn dot_codes(codes: &[u8], x: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    let (code_chunks, code_rest) = codes.as_chunks::<LANES>();
    let (x_chunks, x_rest) = x.as_chunks::<LANES>();
    for (codes, x) in code_chunks.iter().zip(x_chunks) {
        for i in 0..LANES {
            lanes[i] += e4m3::widen(codes[i]) * x[i];
        }
    }
    let mut sum = sum_lanes(lanes);
    for (&code, &x) in code_rest.iter().zip(x_rest) {
        sum += e4m3::decode(code) * x;
    }
    sum
}

/// `Σ rows[r][i] · x[i]` for each of four rows: every `x[i]` read serves four products.
pub(super) fn dot_rows(rows: [&[f32]; ROWS], x: &[f32]) -> [f32; ROWS] {
    let mut lanes = [[0f32; ROW_LANES]; ROWS];
    let (x_chunks, x_rest) = x.as_chunks::<ROW_LANES>();
    let [a, b, c, d] = rows.map(|row| row[..x.len()].as_chunks::<ROW_LANES>());
    for ((((x, a), b), c), d) in x_chunks.iter().zip(a.0).zip(b.0).zip(c.0).zip(d.0) {
        for i in 0..ROW_LANES {
            lanes[0][i] += a[i] * x[i];
            lanes[1][i] += b[i] * x[i];
            lanes[2][i] += c[i] * x[i];
            lanes[3][i] += d[i] * x[i];
        }
    }
    let mut sums = lanes.map(sum_lanes);
    for (sum, rest) in sums.iter_mut().zip([a.1, b.1, c.1, d.1]) {
        for (w, x) in rest.iter().zip(x_rest) {
            *sum += w * x;
        }
    }
    sums
}

/// Adds lanes up as a tree.
fn sum_lanes<const L: usize>(mut lanes: [f32; L]) -> f32 {
    let mut width = L;
    while width > 1 {
        width /= 2;
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
    }
    lanes[0]
}
