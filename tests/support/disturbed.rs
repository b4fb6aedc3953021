//! What turned codes do to a model: its products disturbed, on the CPU, by about what tensor cores leave out of them.

use candle_compressed_tensors::{
    Checkpoint, CtFp8Linear, CtLinear, LinearSource, QuantizerCompressedTensors,
};
use candle_core::{DType, Device, Result, Shape, Tensor};
use candle_fp8_transformers::{CausalLm, ModelConfig};
use candle_nn::VarBuilder;

use super::{bound::largest, logits, max_difference};

/// Of each output of an FP8 linear, relative. Tensor cores keep 13 bits of the largest of the products that they add at
/// once, which is some times the sum.
const DISTURBANCE: f64 = 1.0 / 2048.0;

/// Disturbed models, and how many times the furthest of them is allowed: turned codes are few, so chance is in it.
const SEEDS: u64 = 8;
const TIMES: f64 = 2.0;

/// How far apart logits are.
#[derive(Debug, Clone, Copy)]
pub struct Distance {
    pub largest: f64,
    pub root_mean_square: f64,
}

impl std::fmt::LowerExp for Distance {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::LowerExp::fmt(&self.largest, f)?;
        f.write_str(" (")?;
        std::fmt::LowerExp::fmt(&self.root_mean_square, f)?;
        f.write_str(")")
    }
}

impl Distance {
    pub fn between(a: &[Vec<f64>], b: &[Vec<f64>]) -> Self {
        let pairs = a.iter().flatten().zip(b.iter().flatten());
        let squares: f64 = pairs.map(|(a, b)| (a - b).powi(2)).sum();
        Self {
            largest: max_difference(a, b),
            root_mean_square: (squares / (a.len() * a[0].len()) as f64).sqrt(),
        }
    }

    /// How many times a limit this is, by the worse of the two; infinite for NaN.
    pub fn excess(self, limit: Self) -> f64 {
        let [a, b] = [
            self.largest / limit.largest,
            self.root_mean_square / limit.root_mean_square,
        ];
        if a.is_nan() || b.is_nan() {
            f64::INFINITY
        } else {
            a.max(b)
        }
    }
}

/// How far from logits `[tokens, vocab]` a model may be that computes in f32 throughout.
pub fn of_f32(expected: &[Vec<f64>]) -> Distance {
    let bound = 1e-4 * largest(expected);
    Distance {
        largest: bound,
        root_mean_square: bound,
    }
}

/// How far from logits `[tokens, vocab]` a model may be whose products come from tensor cores, with quantized
/// activations.
pub fn limit(
    checkpoint: &Checkpoint,
    quantizer: &QuantizerCompressedTensors,
    ids: &[u32],
    expected: &[Vec<f64>],
) -> Distance {
    let mut limit = Distance {
        largest: 1e-5 * largest(expected),
        root_mean_square: 1e-5 * largest(expected),
    };
    for seed in 0..SEEDS {
        let found = changed_logits(checkpoint, quantizer, ids, |name, linear| {
            rescaled(linear, |index| 1.0 + DISTURBANCE * noise(name, index, seed))
        });
        let distance = Distance::between(&found, expected);
        limit.largest = limit.largest.max(TIMES * distance.largest);
        limit.root_mean_square = limit
            .root_mean_square
            .max(TIMES * distance.root_mean_square);
    }
    limit
}

/// The logits on the CPU with other FP8 linears.
pub fn changed_logits(
    checkpoint: &Checkpoint,
    quantizer: &QuantizerCompressedTensors,
    ids: &[u32],
    change: impl Fn(&str, CtFp8Linear) -> Result<CtFp8Linear>,
) -> Vec<Vec<f64>> {
    let config = ModelConfig::from_json(checkpoint.config()).expect("a config");
    let vb = quantizer
        .var_builder(DType::F32, &Device::Cpu)
        .expect("a float dtype");
    let source = Changed {
        inner: quantizer,
        change,
    };
    logits(&CausalLm::load(&config, &source, vb).expect("a model"), ids)
}

/// A linear whose scales are multiplied by numbers: those of each output, or of each block of the weight.
pub fn rescaled(linear: CtFp8Linear, factor: impl Fn(usize) -> f64) -> Result<CtFp8Linear> {
    use candle_fp8::ScaleLayout::{Channel, Tensor as One};
    let weight = linear.weight()?;
    let (layout, scale) = match linear.layout() {
        // One scale of all outputs is as many equal ones.
        One => {
            let scale = linear.weight_scale().reshape((1, 1))?;
            (
                Channel,
                scale.broadcast_as((weight.dim(0)?, 1))?.contiguous()?,
            )
        }
        layout => (layout, linear.weight_scale().clone()),
    };
    let factors = Tensor::from_iter((0..scale.elem_count()).map(factor), &Device::Cpu)?;
    let scale = (scale.to_dtype(DType::F64)? * factors.reshape(scale.shape())?)?;
    let (bias, activations) = (linear.bias().cloned(), linear.activations());
    CtFp8Linear::new(
        weight,
        scale.to_dtype(DType::F32)?,
        layout,
        bias,
        activations,
    )
}

struct Changed<'a, F> {
    inner: &'a dyn LinearSource,
    change: F,
}

impl<F: Fn(&str, CtFp8Linear) -> Result<CtFp8Linear>> LinearSource for Changed<'_, F> {
    fn linear_b(&self, k: usize, n: usize, bias: bool, vb: VarBuilder) -> Result<CtLinear> {
        let name = vb.prefix();
        match self.inner.linear_b(k, n, bias, vb)? {
            CtLinear::Fp8(linear) => (self.change)(&name, linear).map(CtLinear::Fp8),
            dense => Ok(dense),
        }
    }

    fn resident_dtype(&self, vb: &VarBuilder, tensor: &str) -> DType {
        self.inner.resident_dtype(vb, tensor)
    }

    fn same_values(&self, vb: &VarBuilder, shape: &Shape, a: &str, b: &str) -> Result<bool> {
        self.inner.same_values(vb, shape, a, b)
    }
}

/// A number in -1..1, and another one for each name, index and seed.
fn noise(name: &str, index: usize, seed: u64) -> f64 {
    let mut state = 0xcbf2_9ce4_8422_2325u64 ^ seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    for byte in name.bytes().chain(index.to_le_bytes()) {
        state = (state ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    state = (state ^ (state >> 31)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    state = (state ^ (state >> 29)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
}
