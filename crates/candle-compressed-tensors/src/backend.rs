//! The backend of the `VarBuilder`: one name, two answers. Codes for who asks for F8E4M3, values for everybody else.

use candle_core::{DType, Device, Result, Shape, Tensor};
use candle_nn::{Init, var_builder::SimpleBackend};

use crate::{
    convert::{Conversion, Stored},
    dense,
    quantizer::QuantizerCompressedTensors,
};

/// Serves the tensors of a checkpoint under their stored names, merged experts under theirs.
pub(crate) struct Backend {
    quantizer: QuantizerCompressedTensors,
    /// Those of the `VarBuilder`, which names none when it asks whether a tensor is there.
    dtype: DType,
    device: Device,
}

impl Backend {
    pub(crate) fn new(
        quantizer: QuantizerCompressedTensors,
        dtype: DType,
        device: &Device,
    ) -> Self {
        Self {
            quantizer,
            dtype,
            device: device.clone(),
        }
    }

    /// The stored name of the KV cache's scale that is served as `name`, where the cache is quantized.
    fn kv_scale(&self, name: &str) -> Option<&str> {
        (self.quantizer.plan().kv_scale(name))
            .filter(|_| self.quantizer.stays_fp8(&self.device, self.dtype))
    }

    fn load(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        let plan = self.quantizer.plan();
        let stored = Stored {
            quantizer: &self.quantizer,
            dtype,
            device,
        };
        if let Some(conversion) = plan.conversions.get(name) {
            return float(name, dtype).and_then(|()| conversion.load(stored));
        }
        if plan.weight(name).is_some() {
            if dtype == DType::F8E4M3 {
                return dense::codes(&stored.view(name)?, device);
            }
            float(name, dtype)?;
            return Conversion::dequantize(name).load(stored);
        }
        let name = self.kv_scale(name).unwrap_or(name);
        if let (DType::F8E4M3, Some(info)) = (dtype, self.quantizer.checkpoint().info(name)) {
            candle_core::bail!(
                "{name}: asked for as F8E4M3 codes, but it is stored as {:?}",
                info.dtype
            )
        }
        if plan.weight_scale(name).is_some() {
            return Conversion::reshape_scale(name)
                .load(stored)?
                .to_dtype(dtype);
        }
        dense::load(&stored.view(name)?, dtype, device)
    }
}

/// Dequantized values are floating point.
fn float(name: &str, dtype: DType) -> Result<()> {
    match dtype {
        DType::BF16 | DType::F16 | DType::F32 => Ok(()),
        _ => candle_core::bail!(
            "{name}: dequantized values come as BF16, F16 or F32, not as {dtype:?}"
        ),
    }
}

impl SimpleBackend for Backend {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: Init,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        // Before the tensor is loaded, where the shape is known: a mistaken dimension should not cost gigabytes.
        if let Some(info) = self.quantizer.checkpoint().info(name)
            && self.quantizer.plan().weight_scale(name).is_none()
            && info.shape != shape.dims()
        {
            return Err(unexpected(name, shape, info.shape.clone().into()));
        }
        let tensor = self.load(name, dtype, device)?;
        if tensor.shape() != &shape {
            return Err(unexpected(name, shape, tensor.shape().clone()));
        }
        Ok(tensor)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        self.load(name, dtype, device)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        let plan = self.quantizer.plan();
        if plan.kv_scales.contains_key(name) {
            return self.kv_scale(name).is_some();
        }
        plan.conversions.contains_key(name) || self.quantizer.checkpoint().info(name).is_some()
    }
}

fn unexpected(name: &str, expected: Shape, got: Shape) -> candle_core::Error {
    candle_core::Error::UnexpectedShape {
        msg: format!("shape mismatch for {name}"),
        expected,
        got,
    }
    .bt()
}
