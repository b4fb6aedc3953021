//! Weights to E4M3, as compressed-tensors does it.

use super::quantize::{amax, max_or_nan};
use super::{Element, rows_per_task};
use crate::{ScaleLayout, e4m3};
use rayon::prelude::*;

/// The largest magnitude under each scale of a weight `w`, rows of `k`; NaN where there is one.
///
/// # Panics
/// If `k` is 0 or `w` is not whole rows.
pub fn weight_amax(w: &[f32], k: usize, layout: ScaleLayout) -> Vec<f32> {
    assert!(k > 0, "rows are not empty");
    assert_eq!(w.len() % k, 0, "w is whole rows");
    let n = w.len() / k;
    // Rows that share scales are a band; a band has as many scales as a row.
    let band = match layout {
        ScaleLayout::Tensor => n.max(1),
        ScaleLayout::Channel => 1,
        ScaleLayout::Block { rows, .. } => rows,
    };
    let run = layout.run(k);
    let across = k.div_ceil(run);
    let mut largest = vec![0f32; layout.len(n, k)];
    largest
        .par_chunks_mut(across)
        .zip(w.par_chunks(band * k))
        .for_each(|(largest, band)| {
            for row in band.chunks_exact(k) {
                for (largest, run) in largest.iter_mut().zip(row.chunks(run)) {
                    *largest = max_or_nan(*largest, amax(run));
                }
            }
        });
    largest
}

/// Codes of a weight `w`, rows of `k`: `encode(Q(w / scale))`, where `Q` is the type that the quotient is rounded to
/// before it is rounded to E4M3 (`f32`: it is rounded once).
///
/// # Panics
/// If `k` is 0 or the lengths do not fit together.
pub fn quantize_weight<Q: Element>(
    w: &[f32],
    k: usize,
    scales: &[f32],
    layout: ScaleLayout,
    codes: &mut [u8],
) {
    assert!(k > 0, "rows are not empty");
    assert_eq!(w.len(), codes.len(), "one code for each value");
    let n = w.len() / k;
    assert_eq!(w.len(), n * k, "w is whole rows");
    assert_eq!(
        scales.len(),
        layout.len(n, k),
        "scales are as their layout says"
    );
    let rows = rows_per_task(k);
    w.par_chunks(rows * k)
        .zip(codes.par_chunks_mut(rows * k))
        .enumerate()
        .for_each(|(task, (w, codes))| {
            let rows = w.chunks_exact(k).zip(codes.chunks_exact_mut(k));
            for (row, (w, codes)) in (task * rows_per_task(k)..).zip(rows) {
                let row = layout.row(scales, row, k);
                let runs = w.chunks(row.run).zip(codes.chunks_mut(row.run));
                for ((w, codes), &scale) in runs.zip(row.scales) {
                    for (code, &w) in codes.iter_mut().zip(w) {
                        *code = e4m3::encode(Q::from_f32(w / scale).to_f32());
                    }
                }
            }
        });
}
