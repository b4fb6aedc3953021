//! What is written for each tensor of the checkpoint, made when the writer asks for it.

use std::{
    borrow::Cow,
    cell::RefCell,
    collections::{HashMap, HashSet},
};

use candle_core::{DType, Device, Tensor};
use safetensors::{Dtype, View};

use crate::{
    Error, QuantizerCompressedTensors, State, StateTensor,
    checkpoint::stored_bytes,
    convert::{Conversion, Stored},
    dense,
    save::config,
};

/// One tensor of the new checkpoint.
pub(crate) struct Output {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
}

/// All tensors of the new checkpoint, and where their values come from.
pub(crate) struct Outputs<'a> {
    pub(crate) list: Vec<Output>,
    quantizer: &'a QuantizerCompressedTensors,
    state: &'a State,
    /// From a stored tensor to the merged one that holds its values now, and how it was merged.
    merged: HashMap<&'a str, (&'a Conversion, Tensor)>,
    /// From a stored tensor to its name in the state, where that is another one.
    served: HashMap<&'a str, String>,
}

impl<'a> Outputs<'a> {
    pub(crate) fn new(
        quantizer: &'a QuantizerCompressedTensors,
        state: &'a State,
    ) -> Result<Self, Error> {
        let (checkpoint, plan) = (quantizer.checkpoint(), quantizer.plan());
        let dense = safetensors::Dtype::from(config::model_dtype(checkpoint));
        let mut list = Vec::new();
        for (name, info) in checkpoint.tensors() {
            let (name, mut dtype, shape) = (name.to_string(), info.dtype, info.shape.clone());
            if plan.dequantize {
                if plan.is_scale(&name) {
                    continue;
                }
                if plan.weight(&name).is_some() {
                    dtype = dense;
                }
            }
            list.push(Output { name, dtype, shape });
        }
        let mut merged = HashMap::new();
        for conversion in plan.conversions.values() {
            if let Some(tensor) = state.get(conversion.target()) {
                let tensor = tensor.tensor()?;
                merged.extend(
                    conversion
                        .sources()
                        .map(|name| (name, (conversion, tensor.clone()))),
                );
            }
        }
        let mut served: HashMap<&str, String> = plan
            .kv_scales
            .iter()
            .map(|(served, stored)| (stored.as_str(), served.clone()))
            .collect();
        for (name, module) in plan.modules() {
            served.insert(&module.scale_name, format!("{name}.weight_scale"));
        }
        let outputs = Self {
            list,
            quantizer,
            state,
            merged,
            served,
        };
        outputs.check_known()?;
        Ok(outputs)
    }

    /// Errs if the state has a tensor that would not be written.
    fn check_known(&self) -> Result<(), Error> {
        let plan = self.quantizer.plan();
        let served: HashSet<&str> = self.served.values().map(String::as_str).collect();
        let known = |name: &&str| {
            self.quantizer.checkpoint().info(name).is_some()
                || plan.conversions.contains_key(*name)
                || served.contains(name)
        };
        match self.state.names().find(|name| !known(name)) {
            Some(name) => Err(Error::Save {
                tensor: name.into(),
                reason: "the checkpoint that the model was loaded from has no such tensor".into(),
            }),
            None => Ok(()),
        }
    }

    /// The values of `output` as the model has them now, in its dtype and shape; `None`: as stored.
    fn current(&self, output: &Output) -> Result<Option<Tensor>, Error> {
        let name = output.name.as_str();
        let plan = self.quantizer.plan();
        let (dtype, device) = (DType::try_from(output.dtype)?, &Device::Cpu);
        let stored = Stored {
            quantizer: self.quantizer,
            dtype,
            device,
        };
        let own = self
            .state
            .get(self.served.get(name).map_or(name, String::as_str));
        let own = own.map(StateTensor::tensor).transpose()?;
        let tensor = match (own, self.merged.get(name)) {
            (Some(tensor), _) if plan.weight_scale(name).is_some() => {
                Conversion::reshape_scale(name).restore(&tensor, name, stored)
            }
            (Some(tensor), _) => Some(Ok(tensor)),
            // Copied where they are: on its way to the host a view would take all experts of the layer along.
            (None, Some((conversion, tensor))) => conversion
                .restore_dense(tensor, name, stored)
                .map(|part| part?.force_contiguous()),
            (None, None) if plan.weight(name).is_some() && plan.dequantize => {
                Some(Conversion::dequantize(name).load(stored))
            }
            (None, None) => None,
        };
        let Some(tensor) = tensor.transpose()? else {
            return Ok(None);
        };
        self.check_shape(output, &tensor)?;
        let tensor = tensor.to_device(device)?;
        if tensor.dtype() == dtype {
            return Ok(Some(tensor));
        }
        if self.unchanged(output, &tensor)? {
            return Ok(None);
        }
        if output.dtype == Dtype::F8_E4M3 {
            return Ok(Conversion::dequantize(name)
                .restore(&tensor, name, stored)
                .transpose()?);
        }
        let cast = tensor.to_dtype(dtype)?;
        if plan.is_scale(name)
            && dense::count_different(&cast.to_dtype(DType::F32)?, &tensor.to_dtype(DType::F32)?)?
                > 0
        {
            let reason = format!("its values do not fit the stored dtype {:?}", output.dtype);
            return Err(Error::Save {
                tensor: name.into(),
                reason,
            });
        }
        Ok(Some(cast))
    }

    fn check_shape(&self, output: &Output, tensor: &Tensor) -> Result<(), Error> {
        // One scale is one scale, however many dimensions of 1 it is written with.
        let scale = self.quantizer.plan().is_scale(&output.name)
            && tensor.elem_count() == output.elements();
        if scale || tensor.dims() == output.shape {
            return Ok(());
        }
        let (found, expected) = (tensor.dims(), &output.shape);
        Err(Error::Save {
            tensor: output.name.clone(),
            reason: format!("the model has shape {found:?}, the checkpoint {expected:?}"),
        })
    }

    /// Whether `tensor` is what loading gives for `output`'s stored form. If so the stored bytes are the better ones: the
    /// model's dtype may be the narrower.
    fn unchanged(&self, output: &Output, tensor: &Tensor) -> Result<bool, Error> {
        let checkpoint = self.quantizer.checkpoint();
        let as_stored = checkpoint
            .info(&output.name)
            .is_some_and(|info| info.dtype == output.dtype);
        if !as_stored || self.quantizer.plan().is_scale(&output.name) {
            return Ok(false);
        }
        let stored = Stored {
            quantizer: self.quantizer,
            dtype: tensor.dtype(),
            device: &Device::Cpu,
        };
        let loaded = Conversion::dequantize(&output.name).load(stored)?;
        Ok(dense::count_different(&loaded, tensor)? == 0)
    }
}

impl Output {
    fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    pub(crate) fn bytes(&self) -> u64 {
        stored_bytes(self.dtype, &self.shape)
    }

    pub(crate) fn view<'a>(
        &'a self,
        outputs: &'a Outputs<'a>,
        failed: &'a RefCell<Option<Error>>,
    ) -> OutputView<'a> {
        OutputView {
            output: self,
            outputs,
            failed,
        }
    }
}

/// What the safetensors writer sees. Bytes are made when they are written, and dropped after.
pub(crate) struct OutputView<'a> {
    output: &'a Output,
    outputs: &'a Outputs<'a>,
    failed: &'a RefCell<Option<Error>>,
}

impl OutputView<'_> {
    fn bytes(&self) -> Result<Cow<'_, [u8]>, Error> {
        match self.outputs.current(self.output)? {
            Some(tensor) => Ok(Cow::Owned(View::data(&tensor).into_owned())),
            None => Ok(Cow::Borrowed(
                self.outputs
                    .quantizer
                    .checkpoint()
                    .view(&self.output.name)?
                    .data(),
            )),
        }
    }
}

impl View for OutputView<'_> {
    fn dtype(&self) -> Dtype {
        self.output.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.output.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        // After a failure the file is removed: the rest need not be made.
        if self.failed.borrow().is_some() {
            return Cow::Owned(vec![0; self.data_len()]);
        }
        self.bytes().unwrap_or_else(|error| {
            self.failed.replace(Some(error));
            Cow::Owned(vec![0; self.data_len()])
        })
    }

    fn data_len(&self) -> usize {
        self.output.bytes() as usize
    }
}
