//! What a token needs beside its linears, one element after the other.

use super::Float;

/// `weight · round(x / √(mean(x²) + eps))` of rows of `weight.len()`; not rounded at the end.
pub(crate) fn rms_norm(x: &[f64], weight: &[f64], eps: f64, float: Float) -> Vec<f64> {
    let k = weight.len();
    let mut y = Vec::new();
    for row in x.chunks(k) {
        let mean = row.iter().map(|x| x * x).sum::<f64>() / k as f64;
        for (x, weight) in row.iter().zip(weight) {
            y.push(weight * float.round(x / (mean + eps).sqrt()));
        }
    }
    y
}

/// `gate / (1 + e^-gate) · up`
pub(crate) fn silu_mul(gate: &[f64], up: &[f64]) -> Vec<f64> {
    let pairs = gate.iter().zip(up);
    pairs.map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect()
}

/// Rotates `x [B, L, H, D]`: element i of the first half and of the second by the angle `[L, D / 2]` of its position.
pub(crate) fn rope(x: &[f64], [_, l, h, d]: [usize; 4], cos: &[f64], sin: &[f64]) -> Vec<f64> {
    let half = d / 2;
    let mut y = vec![0.0; x.len()];
    for (row, (x, y)) in x.chunks(d).zip(y.chunks_mut(d)).enumerate() {
        let position = row / h % l;
        for i in 0..half {
            let (cos, sin) = (cos[position * half + i], sin[position * half + i]);
            y[i] = x[i] * cos - x[i + half] * sin;
            y[i + half] = x[i + half] * cos + x[i] * sin;
        }
    }
    y
}

/// `q [B, L, Hq, D]`, `k` and `v` `[B, Hkv, T, D]` → `[B, L, Hq, D]`. Query l is at position `T - L + l`.
pub(crate) fn attention(
    q: (&[f64], [usize; 4]),
    k: (&[f64], [usize; 4]),
    v: &[f64],
    window: Option<usize>,
    scale: f64,
) -> Vec<f64> {
    let ((q, [batch, len, heads, dim]), (k, [_, kv_heads, total, _])) = (q, k);
    let mut y = Vec::new();
    for b in 0..batch {
        for l in 0..len {
            for h in 0..heads {
                let q = &q[((b * len + l) * heads + h) * dim..][..dim];
                let head = b * kv_heads + h / (heads / kv_heads);
                let position = total - len + l;
                let mut weights = vec![0.0; total];
                for (key, weight) in weights.iter_mut().enumerate() {
                    if key <= position && window.is_none_or(|window| position - key < window) {
                        let k = &k[(head * total + key) * dim..][..dim];
                        let score: f64 = q.iter().zip(k).map(|(q, k)| q * k).sum();
                        *weight = (score * scale).exp();
                    }
                }
                let sum: f64 = weights.iter().sum();
                for d in 0..dim {
                    let values = (0..total).map(|key| v[(head * total + key) * dim + d]);
                    y.push(values.zip(&weights).map(|(v, w)| v * w).sum::<f64>() / sum);
                }
            }
        }
    }
    y
}
