//! The models written down plainly, in f64, one sequence, one position and one head at a time, with
//! every expert computed for every token. Nothing of the crate is used but the config's fields.

use candle_core::DType;
use candle_fp8_transformers::{ModelConfig, RopeScaling};

use super::{Tensors, moe_name};

type Vector = Vec<f64>;

/// Logits `[L][V]` of one sequence.
pub(crate) fn logits(config: &ModelConfig, tensors: &Tensors, ids: &[u32]) -> Vec<Vector> {
    let weights = Weights(tensors);
    let eps = config.rms_norm_eps;
    let embeddings = weights.matrix("model.embed_tokens.weight");
    let mut xs: Vec<Vector> = ids
        .iter()
        .map(|&id| embeddings[id as usize].clone())
        .collect();
    for i in 0..config.num_hidden_layers {
        let layer = format!("model.layers.{i}");
        let normed = weights.norms(&format!("{layer}.input_layernorm"), &xs, eps);
        let attended = attention(config, &weights, i, &normed);
        add(&mut xs, attended);
        let normed = weights.norms(&format!("{layer}.post_attention_layernorm"), &xs, eps);
        let mlp = |x: &Vector| match config.is_sparse(i) {
            true => moe(
                config,
                &weights,
                &format!("{layer}.{}", moe_name(config)),
                x,
            ),
            false => {
                let name = |part: &str| format!("{layer}.mlp.{part}_proj");
                let gate = weights.linear(&name("gate"), x);
                let up = weights.linear(&name("up"), x);
                weights.linear(&name("down"), &gated(&gate, &up))
            }
        };
        let y = normed.iter().map(mlp).collect();
        add(&mut xs, y);
    }
    let xs = weights.norms("model.norm", &xs, eps);
    let head = match config.tie_word_embeddings {
        Some(true) => embeddings,
        _ => weights.matrix("lm_head.weight"),
    };
    xs.iter().map(|x| product(&head, x)).collect()
}

fn attention(config: &ModelConfig, weights: &Weights, layer: usize, xs: &[Vector]) -> Vec<Vector> {
    let name = |part: &str| format!("model.layers.{layer}.self_attn.{part}");
    let d = config.head_dim;
    // [position][head][d]
    let heads = |part: &str, norm: &str, rotate: bool| -> Vec<Vec<Vector>> {
        let one = |(position, x): (usize, &Vector)| {
            let y = weights.linear(&name(part), x);
            let head = |head: &[f64]| {
                let mut head = head.to_vec();
                if config.qk_norm && rotate {
                    head = weights.norm(&name(norm), &head, config.rms_norm_eps);
                }
                if rotate {
                    rope(config, &head, position)
                } else {
                    head
                }
            };
            y.chunks(d).map(head).collect()
        };
        xs.iter().enumerate().map(one).collect()
    };
    let q = heads("q_proj", "q_norm", true);
    let mut k = heads("k_proj", "k_norm", true);
    let mut v = heads("v_proj", "", false);
    for (states, scale) in [(&mut k, name("k_scale")), (&mut v, name("v_scale"))] {
        if let Some(scale) = weights.0.get(&scale) {
            let scale = scale.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            for heads in states.iter_mut() {
                for (head, values) in heads.iter_mut().enumerate() {
                    let scale = scale[if scale.len() == 1 { 0 } else { head }] as f64;
                    values
                        .iter_mut()
                        .for_each(|x| *x = e4m3(*x / scale) * scale);
                }
            }
        }
    }
    let groups = config.num_attention_heads / config.num_key_value_heads;
    let window = config.sliding_windows[layer].unwrap_or(usize::MAX);
    let attend = |position: usize| {
        let mut y = Vector::new();
        for (head, q) in q[position].iter().enumerate() {
            let seen: Vec<usize> = (0..=position).filter(|k| position - k < window).collect();
            let score = |&key: &usize| dot(q, &k[key][head / groups]) / (d as f64).sqrt();
            let p = softmax(&seen.iter().map(score).collect::<Vector>());
            let value = |i: usize| -> f64 {
                seen.iter()
                    .zip(&p)
                    .map(|(&key, p)| p * v[key][head / groups][i])
                    .sum()
            };
            y.extend((0..d).map(value));
        }
        weights.linear(&name("o_proj"), &y)
    };
    (0..xs.len()).map(attend).collect()
}

fn rope(config: &ModelConfig, head: &[f64], position: usize) -> Vector {
    assert_eq!(config.rope.scaling, RopeScaling::Default);
    let half = head.len() / 2;
    let mut y = head.to_vec();
    for i in 0..half {
        let frequency = config
            .rope
            .theta
            .powf(-(2.0 * i as f64) / head.len() as f64);
        let (sin, cos) = (position as f64 * frequency).sin_cos();
        y[i] = head[i] * cos - head[i + half] * sin;
        y[i + half] = head[i + half] * cos + head[i] * sin;
    }
    y
}

fn moe(config: &ModelConfig, weights: &Weights, name: &str, x: &Vector) -> Vector {
    let moe = config.moe.as_ref().unwrap();
    let p = softmax(&weights.linear(&format!("{name}.gate"), x));
    let gate_up = weights.values(&format!("{name}.experts.gate_up_proj"));
    let down = weights.values(&format!("{name}.experts.down_proj"));
    let (h, inner) = (config.hidden_size, moe.intermediate_size);
    // The k-th largest probability; there are no ties among made-up weights.
    let mut sorted = p.clone();
    sorted.sort_by(|a, b| b.total_cmp(a));
    let chosen: f64 = sorted[..moe.num_experts_per_tok].iter().sum();
    let last = sorted[moe.num_experts_per_tok - 1];
    let mut y = vec![0.0; h];
    for (expert, &p) in p.iter().enumerate() {
        let rows = |all: &[f64], start: usize, rows: usize, columns: usize| -> Vec<Vector> {
            let matrix = &all[start * columns..(start + rows) * columns];
            matrix.chunks(columns).map(<[f64]>::to_vec).collect()
        };
        let gate = product(&rows(&gate_up, expert * 2 * inner, inner, h), x);
        let up = product(&rows(&gate_up, expert * 2 * inner + inner, inner, h), x);
        let result = product(&rows(&down, expert * h, h, inner), &gated(&gate, &up));
        let weight = match (p >= last, moe.norm_topk_prob) {
            (false, _) => 0.0,
            (true, false) => p,
            (true, true) => p / chosen,
        };
        y.iter_mut().zip(result).for_each(|(y, r)| *y += weight * r);
    }
    y
}

struct Weights<'a>(&'a Tensors);

impl Weights<'_> {
    fn values(&self, name: &str) -> Vector {
        let tensor = self.0[name].to_dtype(DType::F64).unwrap();
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    fn matrix(&self, name: &str) -> Vec<Vector> {
        self.0[name]
            .to_dtype(DType::F64)
            .unwrap()
            .to_vec2()
            .unwrap()
    }

    fn linear(&self, name: &str, x: &[f64]) -> Vector {
        let mut y = product(&self.matrix(&format!("{name}.weight")), x);
        if self.0.contains_key(&format!("{name}.bias")) {
            let bias = self.values(&format!("{name}.bias"));
            y.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
        }
        y
    }

    fn norm(&self, name: &str, x: &[f64], eps: f64) -> Vector {
        let rms = (dot(x, x) / x.len() as f64 + eps).sqrt();
        let weight = self.values(&format!("{name}.weight"));
        x.iter().zip(weight).map(|(x, w)| x / rms * w).collect()
    }

    fn norms(&self, name: &str, xs: &[Vector], eps: f64) -> Vec<Vector> {
        xs.iter().map(|x| self.norm(name, x, eps)).collect()
    }
}

fn product(matrix: &[Vector], x: &[f64]) -> Vector {
    matrix.iter().map(|row| dot(row, x)).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn gated(gate: &[f64], up: &[f64]) -> Vector {
    gate.iter()
        .zip(up)
        .map(|(g, u)| g / (1.0 + (-g).exp()) * u)
        .collect()
}

fn softmax(x: &[f64]) -> Vector {
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = x.iter().map(|x| (x - max).exp()).sum();
    x.iter().map(|x| (x - max).exp() / total).collect()
}

fn add(xs: &mut [Vector], ys: Vec<Vector>) {
    for (x, y) in xs.iter_mut().zip(ys) {
        x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
    }
}

/// The E4M3 value nearest to `x`: 3 mantissa bits, exponents from -6, subnormals below, at most 448.
pub(crate) fn e4m3(x: f64) -> f64 {
    if x == 0.0 {
        return 0.0;
    }
    let exponent = x.abs().log2().floor().max(-6.0);
    let step = (exponent - 3.0).exp2();
    ((x / step).round_ties_even() * step).clamp(-448.0, 448.0)
}
