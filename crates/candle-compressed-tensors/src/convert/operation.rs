//! The steps of a conversion, each with its reverse.

use candle_core::{DType, Device, Result, Tensor};
use candle_fp8::Rounding;
use safetensors::tensor::TensorView;

use crate::{Error, QuantizerCompressedTensors, dense, scales};

/// One step from stored tensors to a served one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Operation {
    /// An FP8 weight `[out, in]` and its scale to dense values, as compressed-tensors does it; dense weights pass.
    /// Back: the codes that these values had under the stored scale.
    Dequantize,
    /// Joins the sources of one index along `dim`, in their order. Back: the slice of one source.
    Concat {
        /// The dimension, counted in one source.
        dim: usize,
    },
    /// Joins the indexes (experts) along a new first dimension. Back: one of them.
    Stack,
    /// A scale from its stored shape and dtype to F32 in the shape that the ops take. Back: as it was stored.
    ReshapeScale,
}

/// A value on its way through the operations.
pub(crate) enum Part {
    /// A tensor of the checkpoint that nothing was done to yet, by its name.
    Stored(String),
    Tensor(Tensor),
}

/// The tensors of a checkpoint as the operations see them, and what results are made of.
#[derive(Clone, Copy)]
pub(crate) struct Stored<'a> {
    pub(crate) quantizer: &'a QuantizerCompressedTensors,
    pub(crate) dtype: DType,
    pub(crate) device: &'a Device,
}

/// Which stored tensor is taken back out of a converted one.
pub(crate) struct Place<'a> {
    /// Its place in the stack.
    pub(crate) index: usize,
    /// Its full name.
    pub(crate) name: &'a str,
    /// The sources of the same index, itself among them.
    pub(crate) sources: &'a [String],
}

impl Operation {
    /// Applies the operation to the parts of one index.
    pub(crate) fn apply(self, parts: Vec<Part>, stored: Stored<'_>) -> Result<Vec<Part>> {
        let tensors = |load: &dyn Fn(Part) -> Result<Tensor>| {
            parts.into_iter().map(load).collect::<Result<Vec<_>>>()
        };
        let joined = match self {
            Self::Dequantize => return each(tensors(&|part| part.dequantized(stored))?),
            Self::ReshapeScale => return each(tensors(&|part| part.scale(stored))?),
            Self::Concat { dim } => Tensor::cat(&tensors(&|part| part.tensor(stored))?, dim)?,
            Self::Stack => Tensor::stack(&tensors(&|part| part.tensor(stored))?, 0)?,
        };
        Ok(vec![Part::Tensor(joined)])
    }

    /// Takes the tensor at `place` back out of `whole`, by one step.
    pub(crate) fn undo(
        self,
        whole: &Tensor,
        place: &Place<'_>,
        stored: Stored<'_>,
    ) -> Result<Tensor> {
        match self {
            Self::Stack => whole.get(place.index),
            Self::Concat { dim } => {
                let mut start = 0;
                for source in place.sources {
                    let len = stored.stored_shape(source)?[dim];
                    if source == place.name {
                        return whole.narrow(dim, start, len);
                    }
                    start += len;
                }
                candle_core::bail!("{}: not among the sources of its conversion", place.name)
            }
            Self::Dequantize => match stored.quantizer.plan().weight(place.name) {
                Some(_) => stored.quantize(place.name, whole),
                None => Ok(whole.clone()),
            },
            Self::ReshapeScale => whole.reshape(stored.stored_shape(place.name)?),
        }
    }
}

fn each(tensors: Vec<Tensor>) -> Result<Vec<Part>> {
    Ok(tensors.into_iter().map(Part::Tensor).collect())
}

impl Part {
    pub(crate) fn tensor(self, stored: Stored<'_>) -> Result<Tensor> {
        match self {
            Self::Tensor(tensor) => Ok(tensor),
            Self::Stored(name) => Ok(dense::load(
                &stored.view(&name)?,
                stored.dtype,
                stored.device,
            )?),
        }
    }

    fn dequantized(self, stored: Stored<'_>) -> Result<Tensor> {
        match self {
            Self::Stored(name) => stored.dequantize(&name),
            part => part.tensor(stored),
        }
    }

    fn scale(self, stored: Stored<'_>) -> Result<Tensor> {
        match self {
            Self::Stored(name) => stored.scale(&name),
            part => part.tensor(stored),
        }
    }
}

impl<'a> Stored<'a> {
    /// The mapped bytes of a tensor that is about to be read.
    pub(crate) fn view(self, name: &str) -> Result<TensorView<'a>> {
        let view = self.quantizer.checkpoint().view(name)?;
        self.quantizer.report(name);
        Ok(view)
    }

    /// Dense values of the weight `name`, whether it is stored in FP8 or dense.
    fn dequantize(self, name: &str) -> Result<Tensor> {
        let view = self.view(name)?;
        let Some(module) = self.quantizer.plan().weight(name) else {
            return dense::load(&view, self.dtype, self.device);
        };
        let scale = self.view(&module.scale_name)?;
        let scale_dtype = DType::try_from(scale.dtype())?;
        let values = scales::check_values(self.quantizer.checkpoint(), &module.scale_name)?;
        candle_fp8::dequantize_bytes(
            view.data(),
            module.shape,
            &values,
            module.layout,
            scale_dtype,
            self.dtype,
            self.device,
        )
    }

    /// The scale `name` of an FP8 weight: F32, shaped as the ops take it.
    fn scale(self, name: &str) -> Result<Tensor> {
        let Some(module) = self.quantizer.plan().weight_scale(name) else {
            candle_core::bail!("{name}: not the scale of an FP8 weight")
        };
        let (n, k) = module.shape;
        self.quantizer.report(name);
        let values = scales::check_values(self.quantizer.checkpoint(), name)?;
        Tensor::from_vec(values, module.layout.shape(n, k), self.device)
    }

    /// The codes of the FP8 weight `name` whose dequantized values are `values`.
    ///
    /// # Errors
    /// The values are not those of any codes under the stored scale: they were changed, or lost in a narrower dtype.
    fn quantize(self, name: &str, values: &Tensor) -> Result<Tensor> {
        let Some(module) = self.quantizer.plan().weight(name) else {
            candle_core::bail!("{name}: not an FP8 weight")
        };
        let scale_dtype = DType::try_from(self.view(&module.scale_name)?.dtype())?;
        let (scale, values) = (self.scale(&module.scale_name)?, values.contiguous()?);
        let codes = candle_fp8::quantize_weight(&values, &scale, module.layout, Rounding::Once)?;
        let again =
            candle_fp8::dequantize(&codes, &scale, module.layout, scale_dtype, values.dtype())?;
        let differ = dense::count_different(&again, &values)?;
        if differ > 0 {
            let reason = format!(
                "{differ} of its values have no FP8 code under the stored scale (changed after loading, or loaded as \
                 {:?}, which is too narrow); save it with `dequantize`",
                values.dtype()
            );
            return Err(Error::Save {
                tensor: name.into(),
                reason,
            }
            .into());
        }
        Ok(codes)
    }

    fn stored_shape(self, name: &str) -> Result<&'a [usize]> {
        match self.quantizer.checkpoint().info(name) {
            Some(info) => Ok(&info.shape),
            None => Err(candle_core::Error::CannotFindTensor { path: name.into() }),
        }
    }
}
