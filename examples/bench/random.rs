//! Weights out of a hat: a model of any shape without a checkpoint.

use candle_compressed_tensors::{CtDenseLinear, CtFp8Linear, CtLinear, LinearSource};
use candle_core::{DType, Device, Result, Shape, Tensor, bail};
use candle_fp8::{Quantization, ScaleLayout};
use candle_nn::{Init, VarBuilder, var_builder::SimpleBackend};
use clap::ValueEnum;
use float8::F8E4M3;
use half::{bf16, f16};
use std::sync::Arc;

use super::fill;

/// Told of every tensor that was made: its bytes.
type Made = dyn Fn(u64) + Send + Sync;

/// The form of the output projection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(crate) enum LmHead {
    /// Dense, as checkpoints have it.
    #[default]
    Bf16,
    /// As the linears of the layers.
    Fp8,
}

/// Random weights, the same in every run on a device: FP8 linears with a scale for each output channel and inputs quantized for each
/// token, as an `FP8-dynamic` checkpoint has them. As there, embedding, norms, router and, unless it is asked for in FP8,
/// `lm_head` are dense, and BF16 on the CPU in whatever dtype the model computes; so are the experts, which models take
/// merged, in the model's dtype.
///
/// Every linear keeps the variance of its input, and norms multiply by 1: logits come out near ±5 at any depth.
#[derive(Clone)]
pub(crate) struct RandomWeights {
    made: Arc<Made>,
    lm_head: LmHead,
    /// Whether linears that would be FP8 are dense, of the same values.
    dequantized: bool,
    /// False: tensors have shape and dtype, but one element of memory.
    fill: bool,
    /// Where FP8 linears run, if not where their tensors are.
    #[cfg(feature = "xpu")]
    xpu: Option<candle_compressed_tensors::xpu::XpuDevice>,
}

impl RandomWeights {
    /// Calls `made` with the bytes of each tensor.
    pub(crate) fn new(made: impl Fn(u64) + Send + Sync + 'static) -> Self {
        Self {
            made: Arc::new(made),
            lm_head: LmHead::default(),
            dequantized: false,
            fill: true,
            #[cfg(feature = "xpu")]
            xpu: None,
        }
    }

    /// Calls `made` with the bytes that each tensor would take, and makes none.
    pub(crate) fn measure(made: impl Fn(u64) + Send + Sync + 'static) -> Self {
        Self {
            made: Arc::new(made),
            lm_head: LmHead::default(),
            dequantized: false,
            fill: false,
            #[cfg(feature = "xpu")]
            xpu: None,
        }
    }

    /// The same weights with the output projection in that form.
    pub(crate) fn with_lm_head(self, lm_head: LmHead) -> Self {
        Self { lm_head, ..self }
    }

    /// The same weights with FP8 linears dequantized to the model's dtype.
    pub(crate) fn dequantized(self) -> Self {
        Self {
            dequantized: true,
            ..self
        }
    }

    /// The same weights, those of FP8 linears on that device.
    #[cfg(feature = "xpu")]
    pub(crate) fn with_xpu(self, xpu: Option<candle_compressed_tensors::xpu::XpuDevice>) -> Self {
        Self { xpu, ..self }
    }

    /// The `VarBuilder` for everything that is not an FP8 linear.
    pub(crate) fn var_builder(&self, dtype: DType, device: &Device) -> VarBuilder<'static> {
        let backend: Box<dyn SimpleBackend> = Box::new(self.clone());
        VarBuilder::from_backend(backend, dtype, device.clone())
    }

    /// A tensor made by `values`, which is not called when nothing is to be filled.
    fn tensor(
        &self,
        shape: Shape,
        dtype: DType,
        device: &Device,
        values: impl FnOnce() -> Result<Tensor>,
    ) -> Result<Tensor> {
        let bytes = shape.elem_count() * dtype.size_in_bytes();
        let tensor = match self.fill {
            true => values()?,
            false => Tensor::zeros(1, dtype, device)?.broadcast_as(shape)?,
        };
        (self.made)(bytes as u64);
        Ok(tensor)
    }

    fn dense(&self, shape: Shape, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        let tensor_shape = shape.clone();
        self.tensor(shape, dtype, device, || {
            let dims = tensor_shape.dims();
            let &[.., inputs] = dims else {
                bail!("{name}: a weight has at least one dimension, found {dims:?}")
            };
            if dims.len() == 1 {
                return match name.ends_with("norm.weight") {
                    true => Tensor::ones(tensor_shape, dtype, device),
                    false => Tensor::zeros(tensor_shape, dtype, device),
                };
            }
            // A row of the embedding is an activation, of variance 1. Uniform numbers in ±b have variance b² / 3.
            let variance = match name.ends_with("embed_tokens.weight") {
                true => 1.,
                false => 1. / inputs as f32,
            };
            uniform(&tensor_shape, name, dtype, (3. * variance).sqrt(), device)
        })
    }

    fn fp8_linear(
        &self,
        (in_dim, out_dim): (usize, usize),
        bias: Option<Tensor>,
        vb: &VarBuilder,
    ) -> Result<CtLinear> {
        let (name, device, dtype) = (vb.prefix(), vb.device(), vb.dtype());
        let (shape, layout) = (Shape::from((out_dim, in_dim)), ScaleLayout::Channel);
        let codes = || random_codes(&name, shape.clone(), device);
        let scales = || random_scales(&name, (in_dim, out_dim), device);
        if self.dequantized {
            let values =
                || candle_fp8::dequantize(&codes()?, &scales()?, layout, DType::F32, dtype);
            let weight = self.tensor(shape.clone(), dtype, device, values)?;
            return CtDenseLinear::new(weight, bias).map(CtLinear::Dense);
        }
        let weight = self.tensor(shape.clone(), DType::F8E4M3, device, codes)?;
        let scale = self.tensor(Shape::from((out_dim, 1)), DType::F32, device, scales)?;
        if !self.fill {
            return CtDenseLinear::new(weight, bias).map(CtLinear::Dense);
        }
        let quantization = Some(Quantization::PerToken);
        let linear = CtFp8Linear::new(weight, scale, layout, bias, quantization)?;
        #[cfg(feature = "xpu")]
        if let Some(xpu) = &self.xpu {
            return linear.to_xpu(xpu).map(CtLinear::Fp8);
        }
        Ok(CtLinear::Fp8(linear))
    }
}

impl LinearSource for RandomWeights {
    fn linear_b(
        &self,
        in_dim: usize,
        out_dim: usize,
        bias: bool,
        vb: VarBuilder,
    ) -> Result<CtLinear> {
        let bias = match bias {
            true => Some(vb.get(out_dim, "bias")?),
            false => None,
        };
        let name = vb.prefix();
        let dense = match name.as_str() {
            "lm_head" => self.lm_head == LmHead::Bf16,
            name => name.ends_with(".gate"),
        };
        if !dense {
            return self.fp8_linear((in_dim, out_dim), bias, &vb);
        }
        let (shape, dtype) = ((out_dim, in_dim), self.resident_dtype(&vb, "weight"));
        let weight = vb.get_with_hints_dtype(shape, "weight", Init::default(), dtype)?;
        CtDenseLinear::new(weight, bias).map(CtLinear::Dense)
    }

    /// As for a checkpoint, which stores dense matrices in BF16.
    fn resident_dtype(&self, vb: &VarBuilder, _: &str) -> DType {
        match vb.device().is_cpu() {
            true => DType::BF16,
            false => vb.dtype(),
        }
    }
}

impl SimpleBackend for RandomWeights {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: Init,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        self.dense(shape, name, dtype, device)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> Result<Tensor> {
        bail!("{name}: random weights need to be told a shape")
    }

    /// Everything that a model may ask for is there, but the scales of a quantized KV cache.
    fn contains_tensor(&self, name: &str) -> bool {
        !name.ends_with("_scale")
    }
}

/// Any codes but NaN.
fn random_codes(name: &str, shape: Shape, device: &Device) -> Result<Tensor> {
    let mut codes = vec![F8E4M3::ZERO; shape.elem_count()];
    fill::words(&mut codes, 8, fill::seed(name), |word, codes| {
        for (code, byte) in codes.iter_mut().zip(word.to_le_bytes()) {
            *code = F8E4M3::from_bits(not_nan(byte));
        }
    });
    Tensor::from_vec(codes, shape, device)
}

/// F32 `[out, 1]`, half to one and a half of what keeps the variance of the input.
fn random_scales(name: &str, (in_dim, out_dim): (usize, usize), device: &Device) -> Result<Tensor> {
    let middle = 1. / (root_mean_square_of_codes() * (in_dim as f32).sqrt());
    let mut scales = vec![0f32; out_dim];
    let seed = fill::seed(&format!("{name}.weight_scale"));
    fill::words(&mut scales, 1, seed, |word, scales| {
        scales[0] = middle * (0.5 + (word >> 40) as f32 / (1u64 << 24) as f32);
    });
    Tensor::from_vec(scales, (out_dim, 1), device)
}

/// Elements that a GPU makes at a time: each is an F32 before it is what was asked for.
const ON_DEVICE: usize = 1 << 27;

/// Numbers in ±`bound`, made by a GPU: gigabytes of them would take the host and the way from it many seconds.
fn uniform_on_device(shape: &Shape, dtype: DType, bound: f32, device: &Device) -> Result<Tensor> {
    let values = Tensor::zeros(shape.elem_count(), dtype, device)?;
    for start in (0..shape.elem_count()).step_by(ON_DEVICE) {
        let len = ON_DEVICE.min(shape.elem_count() - start);
        let part = Tensor::rand(-bound, bound, len, device)?.to_dtype(dtype)?;
        values.slice_set(&part, 0, start)?;
    }
    values.reshape(shape)
}

/// Numbers in ±`bound`, in BF16, F16 or F32.
fn uniform(shape: &Shape, name: &str, dtype: DType, bound: f32, device: &Device) -> Result<Tensor> {
    fn make<T: candle_core::WithDType>(
        shape: &Shape,
        name: &str,
        bound: f32,
        device: &Device,
        from_f32: impl Fn(f32) -> T + Sync,
    ) -> Result<Tensor> {
        let step = bound / 32768.;
        let mut values = vec![T::zero(); shape.elem_count()];
        fill::words(&mut values, 4, fill::seed(name), |word, values| {
            for (i, value) in values.iter_mut().enumerate() {
                // The middle of one of 65536 steps: never 0, symmetric around it.
                *value = from_f32((f32::from((word >> (16 * i)) as i16) + 0.5) * step);
            }
        });
        Tensor::from_vec(values, shape.clone(), device)
    }
    match dtype {
        DType::F32 | DType::BF16 | DType::F16 if device.is_cuda() => {
            uniform_on_device(shape, dtype, bound, device)
        }
        DType::F32 => make(shape, name, bound, device, |x| x),
        DType::BF16 => make(shape, name, bound, device, bf16::from_f32),
        DType::F16 => make(shape, name, bound, device, f16::from_f32),
        _ => bail!("{name}: dense weights come in F32, BF16 or F16, not in {dtype:?}"),
    }
}

/// The code itself, or 448 of the same sign in place of NaN.
fn not_nan(code: u8) -> u8 {
    match code & 0x7f {
        0x7f => code - 1,
        _ => code,
    }
}

/// Of the codes that [`not_nan`] makes of uniform bytes.
fn root_mean_square_of_codes() -> f32 {
    let squares = (0..=u8::MAX).map(|byte| F8E4M3::from_bits(not_nan(byte)).to_f32().powi(2));
    (squares.sum::<f32>() / 256.).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::IndexOp;
    use candle_nn::Module;

    #[test]
    fn linears_keep_the_variance_of_their_input() {
        let weights = RandomWeights::new(|_| ());
        let vb = weights.var_builder(DType::F32, &Device::Cpu);
        let x = Tensor::randn(0f32, 1., (32, 512), &Device::Cpu).unwrap();
        // E[(0.5 + u)²] = 13 / 12 for the u uniform in [0, 1) of a scale.
        for (name, expected) in [("model.layers.0.mlp.up_proj", 13. / 12.), ("lm_head", 1.)] {
            let linear = weights.linear_b(512, 768, false, vb.pp(name)).unwrap();
            assert_eq!(linear.is_fp8(), name != "lm_head");
            let y = linear.forward(&x).unwrap();
            let variance = y.sqr().unwrap().mean_all().unwrap();
            let variance = variance.to_scalar::<f32>().unwrap();
            let ratio = variance / expected;
            assert!((0.85..1.15).contains(&ratio), "{name}: {variance}");
        }
    }

    #[test]
    fn dense_matrices_are_bf16_on_the_cpu_and_the_head_is_as_asked() {
        let config = super::super::shape::Shape::Qwen3Moe30b.config(1).unwrap();
        let names = |lm_head, dtype: DType| {
            let weights = RandomWeights::measure(|_| ()).with_lm_head(lm_head);
            let vb = weights.var_builder(dtype, &Device::Cpu);
            let model = candle_fp8_transformers::CausalLm::load(&config, &weights, vb).unwrap();
            let dtype = move |name: &str| model.state().get(name).unwrap().dtype();
            ["embed_tokens", "layers.0.mlp.gate", "norm"]
                .map(|name| dtype(&format!("model.{name}.weight")))
                .into_iter()
                .chain([dtype("lm_head.weight")])
                .collect::<Vec<_>>()
        };
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let fixed = [DType::BF16, DType::BF16, dtype];
            for (head, of_head) in [(LmHead::Bf16, DType::BF16), (LmHead::Fp8, DType::F8E4M3)] {
                let found = names(head, dtype);
                assert_eq!((&found[..3], found[3]), (&fixed[..], of_head), "{dtype:?}");
            }
        }
    }

    #[test]
    fn dequantized_linears_have_the_same_values() {
        let (device, dtype) = (Device::Cpu, DType::F32);
        let weights = RandomWeights::new(|_| ());
        let linear = |weights: &RandomWeights| {
            let vb = weights.var_builder(dtype, &device);
            weights.linear_b(64, 48, false, vb.pp("q_proj")).unwrap()
        };
        let (fp8, dense) = (linear(&weights), linear(&weights.clone().dequantized()));
        assert!(!dense.is_fp8());
        let CtLinear::Fp8(fp8) = fp8 else {
            panic!("expected FP8");
        };
        let values = fp8.weight().unwrap().to_dtype(dtype).unwrap();
        let values = values.broadcast_mul(fp8.weight_scale()).unwrap();
        let values = values.to_vec2::<f32>();
        let found = dense.weight().unwrap().to_vec2::<f32>();
        assert_eq!(found.unwrap(), values.unwrap());
    }

    #[test]
    fn codes_are_no_nan_and_differ_between_modules_and_rows() {
        let weights = RandomWeights::new(|_| ());
        let vb = weights.var_builder(DType::BF16, &Device::Cpu);
        let codes = |name: &str| {
            let linear = weights.linear_b(300, 500, false, vb.pp(name)).unwrap();
            let weight = linear.weight().unwrap();
            weight.to_dtype(DType::F32).unwrap()
        };
        let (a, b) = (codes("a_proj"), codes("b_proj"));
        let values = a.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(values.iter().all(|value| value.is_finite()));
        assert!(values.contains(&448.) && values.contains(&-448.));
        let differ = |a: &Tensor, b: &Tensor| {
            let count = a.ne(b).unwrap().to_dtype(DType::F32).unwrap().sum_all();
            count.unwrap().to_scalar::<f32>().unwrap() > 250.
        };
        assert!(differ(&a, &b));
        assert!(differ(&a.i(0).unwrap(), &a.i(1).unwrap()));
        assert!(!differ(&a, &codes("a_proj")));
    }

    #[test]
    fn measuring_counts_what_making_makes() {
        use std::sync::atomic::{AtomicU64, Ordering};
        let count = |make: fn(Box<dyn Fn(u64) + Send + Sync>) -> RandomWeights| {
            let bytes = Arc::new(AtomicU64::new(0));
            let counter = bytes.clone();
            let weights = make(Box::new(move |made| {
                counter.fetch_add(made, Ordering::Relaxed);
            }));
            let vb = weights.var_builder(DType::BF16, &Device::Cpu);
            weights.linear_b(64, 48, true, vb.pp("q_proj")).unwrap();
            vb.get((4, 10, 6), "experts.down_proj").unwrap();
            bytes.load(Ordering::Relaxed)
        };
        let expected = 64 * 48 + 4 * 48 + 2 * 48 + 2 * 240;
        assert_eq!(count(RandomWeights::new), expected);
        assert_eq!(count(RandomWeights::measure), expected);
    }
}
