use super::super::testing::{Random, for_all_sets};
use super::*;
use half::{bf16, f16};

/// Sizes of a case, with room between heads and sequences of the cache.
#[derive(Debug, Clone, Copy)]
struct Case {
    batch: usize,
    queries: usize,
    keys: usize,
    kv_heads: usize,
    group: usize,
    dim: usize,
    window: Option<usize>,
    /// Positions of the cache beyond the keys.
    room: usize,
}

/// A case's memory. What no query may read is NaN.
struct Data<T> {
    q: Vec<T>,
    k: Vec<T>,
    v: Vec<T>,
}

impl Case {
    fn data<T: Element>(&self, range: f32) -> Data<T> {
        let mut random = Random::new((self.queries * 31 + self.keys * 7 + self.dim) as u64);
        let q = random.values(
            self.batch * self.queries * self.kv_heads * self.group * self.dim,
            range,
        );
        let mut cache = || {
            let mut values = Vec::new();
            for _ in 0..self.batch * self.kv_heads {
                values.extend(random.values::<T>(self.keys * self.dim, range));
                values.resize(values.len() + self.room * self.dim, T::from_f32(f32::NAN));
            }
            values
        };
        let (k, v) = (cache(), cache());
        Data { q, k, v }
    }

    fn args<'a, T>(&self, data: &'a Data<T>) -> Attention<'a, T> {
        let head_stride = (self.keys + self.room) * self.dim;
        let heads = |values| Heads {
            values,
            batch_stride: self.kv_heads * head_stride,
            head_stride,
        };
        Attention {
            batch: self.batch,
            queries: self.queries,
            keys: self.keys,
            heads: self.kv_heads * self.group,
            kv_heads: self.kv_heads,
            dim: self.dim,
            window: self.window,
            scale: 1.0 / (self.dim as f32).sqrt(),
            q: &data.q,
            k: heads(&data.k),
            v: heads(&data.v),
        }
    }

    /// In f64, one query after the other: the results, and the largest magnitude of a value that each of them sees.
    fn expected<T: Element>(&self, data: &Data<T>) -> Vec<(f64, f64)> {
        let value = |values: &[T], i: usize| f64::from(values[i].to_f32());
        let (heads, dim) = (self.kv_heads * self.group, self.dim);
        let mut out = Vec::new();
        for b in 0..self.batch {
            for l in 0..self.queries {
                for h in 0..heads {
                    let position = self.keys - self.queries + l;
                    let q = ((b * self.queries + l) * heads + h) * dim;
                    let head = b * self.kv_heads + h / self.group;
                    let row = |key| (head * (self.keys + self.room) + key) * dim;
                    let seen: Vec<usize> = (0..=position)
                        .filter(|key| self.window.is_none_or(|w| position - key < w))
                        .collect();
                    let dot = |key: &usize| {
                        let products =
                            (0..dim).map(|d| value(&data.q, q + d) * value(&data.k, row(*key) + d));
                        products.sum::<f64>() / (dim as f64).sqrt()
                    };
                    let scores: Vec<f64> = seen.iter().map(dot).collect();
                    let most = scores.iter().copied().fold(f64::MIN, f64::max);
                    let weights: Vec<f64> = scores.iter().map(|s| (s - most).exp()).collect();
                    let total: f64 = weights.iter().sum();
                    for d in 0..dim {
                        let column = || seen.iter().map(|&key| value(&data.v, row(key) + d));
                        let sum: f64 = column().zip(&weights).map(|(v, w)| v * w).sum();
                        out.push((sum / total, column().fold(0.0, |m, v| v.abs().max(m))));
                    }
                }
            }
        }
        out
    }

    fn check<T: Element>(&self, unit: f64, range: f32) {
        let data = self.data::<T>(range);
        let args = self.args(&data);
        let expected = self.expected(&data);
        for_all_sets(|set| {
            let mut out = vec![T::from_f32(f32::NAN); 3];
            attention(set, &args, &mut out);
            for (i, (found, (expected, largest))) in out.iter().zip(&expected).enumerate() {
                let found = f64::from(found.to_f32());
                // A score of up to √D · range² is off by D roundings at most; its exponential by as much, relatively.
                let score = (self.dim as f64).sqrt() * f64::from(range).powi(2);
                let weight = (score * (self.dim as f64 + 3.0) + self.keys as f64 / 8.0 + 16.0)
                    * 2f64.powi(-24);
                let bound = expected.abs() * unit + largest * 2.0 * weight + 1e-7;
                let error = (found - expected).abs();
                assert!(
                    error <= bound,
                    "{} {self:?}: element {i} is {found}, not {expected} (bound {bound:e})",
                    set.name()
                );
            }
        });
    }
}

const PLAIN: Case = Case {
    batch: 1,
    queries: 1,
    keys: 1,
    kv_heads: 1,
    group: 1,
    dim: 64,
    window: None,
    room: 3,
};

/// Sizes that are odd, not multiples of what kernels like to cut by, and on both sides of every threshold.
fn cases() -> Vec<Case> {
    let mut cases = vec![PLAIN];
    // A token, over contexts of one and several ranges of keys.
    for keys in [1, 2, 63, 64, 65, 129, 511, 513, 1500] {
        for (kv_heads, group) in [(1, 1), (2, 4), (3, 3), (1, 8)] {
            for window in [None, Some(1), Some(40), Some(600)] {
                cases.push(Case {
                    keys,
                    kv_heads,
                    group,
                    window,
                    ..PLAIN
                });
            }
        }
    }
    // Few queries and many.
    for (queries, keys) in [
        (2, 2),
        (3, 70),
        (8, 8),
        (9, 9),
        (5, 600),
        (33, 33),
        (130, 250),
        (200, 200),
    ] {
        for (kv_heads, group) in [(1, 1), (2, 2), (1, 5)] {
            for window in [None, Some(3), Some(100)] {
                cases.push(Case {
                    queries,
                    keys,
                    kv_heads,
                    group,
                    window,
                    ..PLAIN
                });
            }
        }
    }
    // Heads of any dimension, sequences side by side.
    for dim in [1, 2, 8, 15, 16, 17, 40, 80, 100, 128, 200] {
        for (queries, keys) in [(1, 77), (2, 5), (40, 90)] {
            cases.push(Case {
                batch: 2,
                queries,
                keys,
                kv_heads: 2,
                group: 3,
                dim,
                ..PLAIN
            });
        }
    }
    cases.push(Case {
        batch: 3,
        queries: 1,
        keys: 200,
        kv_heads: 2,
        group: 2,
        room: 0,
        ..PLAIN
    });
    cases.push(Case {
        queries: 450,
        keys: 700,
        group: 2,
        window: Some(260),
        ..PLAIN
    });
    cases
}

#[test]
fn agrees_with_f64() {
    for case in cases() {
        case.check::<f32>(2f64.powi(-24), 2.0);
    }
}

#[test]
fn agrees_with_f64_in_half_precision() {
    for case in cases().into_iter().step_by(3) {
        case.check::<bf16>(2f64.powi(-8), 2.0);
        case.check::<f16>(2f64.powi(-11), 2.0);
    }
}

#[test]
fn large_scores_do_not_overflow() {
    for queries in [1, 40] {
        let case = Case {
            queries,
            keys: 300,
            group: 2,
            ..PLAIN
        };
        case.check::<f32>(2f64.powi(-24), 30.0);
    }
}

#[test]
fn what_is_not_finite_reaches_those_that_see_it() {
    for (queries, keys) in [(1, 700), (100, 700)] {
        for (poison, value) in [
            ("key", f32::NAN),
            ("key", f32::INFINITY),
            ("value", f32::NAN),
        ] {
            let case = Case {
                queries,
                keys,
                kv_heads: 2,
                group: 2,
                ..PLAIN
            };
            let mut data = case.data::<f32>(1.0);
            // The last key of the first head.
            let at = (keys - 1) * case.dim;
            match poison {
                "key" => data.k[at..at + case.dim].fill(value),
                _ => data.v[at..at + case.dim].fill(value),
            }
            for_all_sets(|set| {
                let mut out = vec![7f32; 3];
                attention(set, &case.args(&data), &mut out);
                let last = out.len() - 4 * case.dim;
                let (first_head, second_head) = out[last..].split_at(2 * case.dim);
                assert!(second_head.iter().all(|y| y.is_finite()));
                // An infinite key makes a score of ±∞: of the one the weight is NaN, of the other 0.
                let poisoned = first_head
                    .chunks(case.dim)
                    .any(|y| y.iter().all(|y| y.is_nan()));
                assert!(poisoned || value.is_infinite(), "{poison} {value}");
                if queries > 1 {
                    assert!(out[..8 * case.dim].iter().all(|y| y.is_finite()));
                }
            });
        }
    }
}
