//! Codes and scales back to dense weights, in the arithmetic of compressed-tensors: the code, which every float type
//! holds exactly, times the scale, rounded in the scale's type; then a cast.

use super::element::Element;
use super::rows_per_task;
use crate::{ScaleLayout, e4m3};
use rayon::prelude::*;

/// Dequantizes codes, rows of `k`, into `out`: `S(code · scale)` as a `T`.
///
/// `S` is the type of the scales, which come as the f32 that they widen to. The product of a code with a BF16 or F16
/// scale is exact in f32, so it is rounded once, as in compressed-tensors.
///
/// # Panics
/// If `k` is 0 or the lengths do not fit together.
pub fn dequantize<S: Element, T: Element>(
    codes: &[u8],
    k: usize,
    scales: &[f32],
    layout: ScaleLayout,
    out: &mut [T],
) {
    assert!(k > 0, "rows are not empty");
    assert_eq!(codes.len(), out.len(), "one value for each code");
    let n = codes.len() / k;
    assert_eq!(codes.len(), n * k, "codes are whole rows");
    assert_eq!(
        scales.len(),
        layout.len(n, k),
        "scales are as their layout says"
    );
    let rows = rows_per_task(k);
    codes
        .par_chunks(rows * k)
        .zip(out.par_chunks_mut(rows * k))
        .enumerate()
        .for_each(|(task, (codes, out))| {
            let rows = codes.chunks_exact(k).zip(out.chunks_exact_mut(k));
            for (row, (codes, out)) in (task * rows_per_task(k)..).zip(rows) {
                let row = layout.row(scales, row, k);
                let runs = codes.chunks(row.run).zip(out.chunks_mut(row.run));
                for ((codes, out), &scale) in runs.zip(row.scales) {
                    for (out, &code) in out.iter_mut().zip(codes) {
                        *out = T::from_f32(S::from_f32(e4m3::decode(code) * scale).to_f32());
                    }
                }
            }
        });
}
