//! The door between a checkpoint and a model.

use std::sync::{Arc, OnceLock};

use candle_core::{DType, Device, Shape};
use candle_fp8::Quantization;
use candle_nn::VarBuilder;
use compressed_tensors::ActivationStrategy;
use safetensors::Dtype;

use crate::{
    Activations, Checkpoint, CtDenseLinear, CtFp8Linear, CtLinear, Error, Fp8Module, LinearSource,
    LoadOptions, Plan, Warning, backend::Backend, linear, warning,
};

/// Builds the linears of a compressed-tensors checkpoint, and the `VarBuilder` for everything else. Cloning is cheap.
///
/// ```no_run
/// use candle_compressed_tensors::{Checkpoint, LoadOptions, QuantizerCompressedTensors};
/// use candle_core::{DType, Device, Shape};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let checkpoint = Checkpoint::open("path/to/model")?;
/// let quantizer = QuantizerCompressedTensors::new(&checkpoint, LoadOptions::default())?;
/// let vb = quantizer.var_builder(DType::BF16, &Device::Cpu)?;
/// let q_proj = quantizer.linear_no_bias(4096, 4096, vb.pp("model.layers.0.self_attn.q_proj"))?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct QuantizerCompressedTensors {
    inner: Arc<Inner>,
    progress: Option<Arc<Progress>>,
}

/// Told of every tensor that was read: the bytes that it takes in the file.
type Progress = dyn Fn(u64) + Send + Sync;

struct Inner {
    checkpoint: Checkpoint,
    options: LoadOptions,
    plan: Plan,
    /// Whether the FP8 ops have kernels on a device.
    fp8_kernels: fn(&Device) -> bool,
    device_warning: OnceLock<Warning>,
}

impl QuantizerCompressedTensors {
    /// Checks every tensor of `checkpoint` against its config, scale values included. Nothing is refused later.
    ///
    /// Warnings go to stderr, once, and stay available as [`warnings`](Self::warnings).
    ///
    /// # Errors
    /// The first thing found wrong; [`Plan::problems`] lists all of them.
    pub fn new(checkpoint: &Checkpoint, options: LoadOptions) -> Result<Self, Error> {
        Self::with_kernels(checkpoint, options, candle_fp8::fp8_kernels)
    }

    fn with_kernels(
        checkpoint: &Checkpoint,
        options: LoadOptions,
        fp8_kernels: fn(&Device) -> bool,
    ) -> Result<Self, Error> {
        #[cfg(feature = "xpu")]
        if options.xpu.is_some() && options.dequantize {
            return Err(Error::Unsupported {
                tensor: "LoadOptions".into(),
                reason:
                    "`xpu` is for FP8 linears, and `dequantize` leaves none; take one of the two"
                        .into(),
            });
        }
        let plan = Plan::new(checkpoint, &options).into_result()?;
        for warning in plan.warnings() {
            warning::print(warning);
        }
        let inner = Inner {
            checkpoint: checkpoint.clone(),
            options,
            plan,
            fp8_kernels,
            device_warning: OnceLock::new(),
        };
        Ok(Self {
            inner: Arc::new(inner),
            progress: None,
        })
    }

    /// The same quantizer, which calls `progress` for every tensor that its `VarBuilder` reads, with the bytes that the
    /// tensor takes in the file. All of them add up to at most [`Checkpoint::bytes`].
    #[must_use]
    pub fn with_progress(self, progress: impl Fn(u64) + Send + Sync + 'static) -> Self {
        Self {
            progress: Some(Arc::new(progress)),
            ..self
        }
    }

    /// Tells who listens that the tensor `name` was read.
    pub(crate) fn report(&self, name: &str) {
        if let (Some(progress), Some(info)) = (&self.progress, self.checkpoint().info(name)) {
            progress(info.bytes());
        }
    }

    /// A `VarBuilder` over the checkpoint.
    ///
    /// Asked for F8E4M3 it gives the codes of an FP8 weight; asked for another dtype it gives values, dequantized where
    /// they are stored in FP8. Stock models can therefore be built from it as it is. Merged experts are there as
    /// `….mlp.experts.gate_up_proj` `[E, 2·I, H]` and `….mlp.experts.down_proj` `[E, H, I]`, beside the tensors of each expert.
    ///
    /// # Errors
    /// `dtype` is not BF16, F16 or F32.
    pub fn var_builder(&self, dtype: DType, device: &Device) -> Result<VarBuilder<'static>, Error> {
        if !matches!(dtype, DType::BF16 | DType::F16 | DType::F32) {
            return Err(Error::Unsupported {
                tensor: "var_builder".into(),
                reason: format!("{dtype:?} is not a dtype to compute in; take BF16, F16 or F32"),
            });
        }
        let backend: Box<dyn candle_nn::var_builder::SimpleBackend> =
            Box::new(Backend::new(self.clone(), dtype, device));
        Ok(VarBuilder::from_backend(backend, dtype, device.clone()))
    }

    /// The linear `[out_dim, in_dim]` under the prefix of `vb`, with its bias. In FP8 if the checkpoint has it so and the
    /// device has kernels for it; a [warning](Self::device_warning) tells if it has none.
    ///
    /// # Errors
    /// A tensor is missing or has another shape.
    pub fn linear(
        &self,
        in_dim: usize,
        out_dim: usize,
        vb: VarBuilder,
    ) -> candle_core::Result<CtLinear> {
        self.linear_b(in_dim, out_dim, true, vb)
    }

    /// As [`linear`](Self::linear), without a bias.
    ///
    /// # Errors
    /// A tensor is missing or has another shape, or the checkpoint has a bias.
    pub fn linear_no_bias(
        &self,
        in_dim: usize,
        out_dim: usize,
        vb: VarBuilder,
    ) -> candle_core::Result<CtLinear> {
        self.linear_b(in_dim, out_dim, false, vb)
    }

    /// Whether the checkpoint stores any weight in FP8.
    pub fn is_fp8(&self) -> bool {
        self.inner.plan.is_fp8()
    }

    /// Whether linears run on FP8 weights, on devices that have kernels for it: the checkpoint is FP8, and `dequantize` is
    /// off.
    pub fn use_fp8_kernel(&self) -> bool {
        self.is_fp8() && !self.inner.plan.dequantize
    }

    /// Whether gradients flow through every linear: not through FP8 ones.
    pub fn is_trainable(&self) -> bool {
        !self.use_fp8_kernel()
    }

    /// What a user should know of this checkpoint and these options.
    pub fn warnings(&self) -> &[Warning] {
        self.inner.plan.warnings()
    }

    /// What a user should know of the device: that it has no kernels for FP8, and what that costs. `None` before something
    /// is loaded that would be FP8 elsewhere. It goes to stderr, too, once.
    pub fn device_warning(&self) -> Option<&Warning> {
        self.inner.device_warning.get()
    }

    /// Whether what the checkpoint has in FP8 can stay so on `device`. If not, the user is told, once, what it costs in
    /// `dtype`.
    pub(crate) fn stays_fp8(&self, device: &Device, dtype: DType) -> bool {
        if (self.inner.fp8_kernels)(device) {
            return true;
        }
        self.inner.device_warning.get_or_init(|| {
            let fp8_bytes = self.inner.plan.linear_bytes();
            let warning = Warning::NoFp8Kernels {
                device: device.location(),
                fp8_bytes,
                dense_bytes: fp8_bytes * dtype.size_in_bytes() as u64,
                kv_cache: !self.inner.plan.kv_scales.is_empty(),
            };
            warning::print(&warning);
            warning
        });
        false
    }

    /// The checkpoint.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.inner.checkpoint
    }

    /// The options.
    pub fn options(&self) -> &LoadOptions {
        &self.inner.options
    }

    /// What every tensor is.
    pub fn plan(&self) -> &Plan {
        &self.inner.plan
    }

    /// How the inputs of `module` are quantized under the options.
    fn quantization(&self, module: &Fp8Module) -> candle_core::Result<Option<Quantization>> {
        Ok(
            match (self.inner.options.activations, module.scheme.activations) {
                (Activations::Full, _) | (Activations::AsCheckpoint, ActivationStrategy::None) => {
                    None
                }
                (Activations::PerToken, _) | (_, ActivationStrategy::DynamicToken) => {
                    Some(Quantization::PerToken)
                }
                (_, ActivationStrategy::DynamicTensor) => Some(Quantization::PerTensor),
                (_, ActivationStrategy::DynamicGroup(size)) => Some(Quantization::PerGroup(size)),
                (_, ActivationStrategy::StaticTensor) => match module.input_scale {
                    Some(scale) => Some(Quantization::Static(scale)),
                    None => {
                        candle_core::bail!("a static scheme without an input scale passed the plan")
                    }
                },
            },
        )
    }
}

impl LinearSource for QuantizerCompressedTensors {
    fn linear_b(
        &self,
        in_dim: usize,
        out_dim: usize,
        bias: bool,
        vb: VarBuilder,
    ) -> candle_core::Result<CtLinear> {
        let name = vb.prefix();
        let module = self
            .inner
            .plan
            .modules()
            .get(&name)
            .filter(|module| !module.dequantized)
            .filter(|_| self.stays_fp8(vb.device(), vb.dtype()));
        let bias = match (bias, vb.contains_tensor("bias")) {
            (true, _) => Some(vb.get(out_dim, "bias")?),
            (false, false) => None,
            (false, true) => candle_core::bail!(
                "{name}: the checkpoint has a bias for this linear, the model asks for none; without it every output \
                 would be wrong"
            ),
        };
        let Some(module) = module else {
            let dtype = self.resident_dtype(&vb, "weight");
            let weight =
                vb.get_with_hints_dtype((out_dim, in_dim), "weight", Default::default(), dtype)?;
            return CtDenseLinear::new(weight, bias).map(CtLinear::Dense);
        };
        let codes = vb.get_with_hints_dtype(
            (out_dim, in_dim),
            "weight",
            Default::default(),
            DType::F8E4M3,
        )?;
        let shape = module.layout.shape(out_dim, in_dim);
        let scale = vb.get_with_hints_dtype(
            shape,
            module.scheme.scale_name,
            Default::default(),
            DType::F32,
        )?;
        let quantization = self.quantization(module)?;
        let linear = CtFp8Linear::new(codes, scale, module.layout, bias, quantization)?;
        #[cfg(feature = "xpu")]
        if let Some(device) = &self.options().xpu {
            return match linear.to_xpu(device) {
                Ok(linear) => Ok(CtLinear::Fp8(linear)),
                Err(error) => Err(error.context(format!("{name}: the weight was not uploaded"))),
            };
        }
        Ok(CtLinear::Fp8(linear))
    }

    /// BF16 on the CPU for what is stored in BF16: the values are the same, and take half the memory of f32.
    fn resident_dtype(&self, vb: &VarBuilder, tensor: &str) -> DType {
        let stored = self.checkpoint().info(&full_name(vb, tensor));
        match stored {
            Some(info) if info.dtype == Dtype::BF16 && vb.device().is_cpu() => DType::BF16,
            _ => vb.dtype(),
        }
    }

    /// Compares the bytes in the file, where they lie: nothing is loaded. Tensors of two dtypes are not the same.
    fn same_values(
        &self,
        vb: &VarBuilder,
        shape: &Shape,
        a: &str,
        b: &str,
    ) -> candle_core::Result<bool> {
        let stored = |tensor| self.checkpoint().view(&full_name(vb, tensor));
        let (Ok(a), Ok(b)) = (stored(a), stored(b)) else {
            // Served under another name than it is stored.
            return linear::same_values(vb, shape, a, b);
        };
        Ok(a.dtype() == b.dtype()
            && [a.shape(), b.shape()] == [shape.dims(); 2]
            && a.data() == b.data())
    }
}

/// The name of `tensor` under the prefix of `vb`.
fn full_name(vb: &VarBuilder, tensor: &str) -> String {
    match vb.prefix() {
        prefix if prefix.is_empty() => tensor.to_string(),
        prefix => format!("{prefix}.{tensor}"),
    }
}

#[cfg(test)]
mod tests;
