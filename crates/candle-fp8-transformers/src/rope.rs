//! Rotary position embedding: frequencies, and the cos and sin of a span of positions.

use std::f32::consts::PI;

use candle_core::{DType, Device, Tensor};

use crate::{Result, RopeConfig, RopeScaling};

/// The frequencies of a model, computed once; cos and sin follow for each span of positions.
#[derive(Debug, Clone, PartialEq)]
pub struct RotaryEmbedding {
    /// One per pair of dimensions: `[D / 2]`.
    inv_freq: Vec<f32>,
    /// Multiplies cos and sin (YaRN); 1 otherwise.
    attention_factor: f32,
}

impl RotaryEmbedding {
    /// Frequencies for heads of width `head_dim` (even), in f32 as transformers computes them.
    pub fn new(config: &RopeConfig, head_dim: usize) -> Self {
        let base = config.theta as f32;
        let plain = (0..head_dim)
            .step_by(2)
            .map(|i| 1.0 / base.powf(i as f32 / head_dim as f32));
        let mut attention_factor = 1.0;
        let inv_freq = match config.scaling {
            RopeScaling::Default => plain.collect(),
            RopeScaling::Linear { factor } => plain.map(|f| f / factor as f32).collect(),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                let (factor, low, high) = (
                    factor as f32,
                    low_freq_factor as f32,
                    high_freq_factor as f32,
                );
                let original = original_max_position_embeddings as f32;
                plain
                    .map(|f| llama3(f, factor, low, high, original))
                    .collect()
            }
            RopeScaling::Yarn {
                factor,
                original_max_position_embeddings,
                attention_factor: multiplier,
                beta_fast,
                beta_slow,
                truncate,
            } => {
                attention_factor = multiplier as f32;
                let (low, high) = yarn_range(
                    head_dim,
                    config.theta,
                    original_max_position_embeddings as f64,
                    (beta_fast, beta_slow),
                    truncate,
                );
                let factor = factor as f32;
                let blend = |(i, f): (usize, f32)| {
                    let stretched = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0) as f32;
                    f / factor * stretched + f * (1.0 - stretched)
                };
                plain.enumerate().map(blend).collect()
            }
        };
        Self {
            inv_freq,
            attention_factor,
        }
    }

    /// Radians per position of each pair of dimensions: `[D / 2]`.
    pub fn inv_freq(&self) -> &[f32] {
        &self.inv_freq
    }

    /// cos and sin, `[len, D / 2]` each in `dtype`, for positions `start .. start + len`.
    ///
    /// They are computed on the host, in f32, so that every device rotates by the same angles and
    /// no table has to cover a context of 131072 tokens.
    pub fn cos_sin(
        &self,
        start: usize,
        len: usize,
        dtype: DType,
        device: &Device,
    ) -> Result<(Tensor, Tensor)> {
        let angles = (start..start + len)
            .flat_map(|position| self.inv_freq.iter().map(move |f| position as f32 * f));
        let (cos, sin): (Vec<f32>, Vec<f32>) = angles
            .map(|angle| {
                (
                    angle.cos() * self.attention_factor,
                    angle.sin() * self.attention_factor,
                )
            })
            .unzip();
        let tensor =
            |values| Tensor::from_vec(values, (len, self.inv_freq.len()), device)?.to_dtype(dtype);
        Ok((tensor(cos)?, tensor(sin)?))
    }
}

/// One frequency under Llama 3.1's rule: wavelengths beyond the original context are stretched.
fn llama3(f: f32, factor: f32, low: f32, high: f32, original: f32) -> f32 {
    let wavelength = 2.0 * PI / f;
    if wavelength < original / high {
        f
    } else if wavelength > original / low {
        f / factor
    } else {
        let kept = (original / wavelength - low) / (high - low);
        (1.0 - kept) * f / factor + kept * f
    }
}

/// First and last pair index of YaRN's passage from kept (below) to stretched (above).
fn yarn_range(
    head_dim: usize,
    theta: f64,
    original: f64,
    (beta_fast, beta_slow): (f64, f64),
    truncate: bool,
) -> (f64, f64) {
    // The pair whose wavelength fits `rotations` times into the original context.
    let pair = |rotations: f64| {
        let turns = original / (rotations * 2.0 * std::f64::consts::PI);
        head_dim as f64 * turns.ln() / (2.0 * theta.ln())
    };
    let (mut low, mut high) = (pair(beta_fast), pair(beta_slow));
    if truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    low = low.max(0.0);
    high = high.min(head_dim as f64 - 1.0);
    if low == high {
        high += 0.001; // as upstream: no division by zero
    }
    (low, high)
}
