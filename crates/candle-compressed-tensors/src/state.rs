//! What a model hands to [`save`](crate::save()).

use std::collections::BTreeMap;

use candle_core::{DType, Result, Tensor};
use candle_fp8::PackedWeight;

use crate::CtLinear;

/// The tensors of a loaded model under their names in the checkpoint. Holds references, copies nothing.
#[derive(Debug, Clone, Default)]
pub struct State(BTreeMap<String, StateTensor>);

/// A tensor of a model.
#[derive(Debug, Clone)]
pub enum StateTensor {
    /// As it is.
    Tensor(Tensor),
    /// The weight of an FP8 linear, as the ops of its device read it.
    Packed(PackedWeight),
}

impl StateTensor {
    /// The tensor. On CUDA, a copy of a packed one.
    ///
    /// # Errors
    /// The device has no memory left for the copy.
    pub fn tensor(&self) -> Result<Tensor> {
        match self {
            Self::Tensor(tensor) => Ok(tensor.clone()),
            Self::Packed(weight) => weight.unpack(),
        }
    }

    /// Its shape.
    pub fn dims(&self) -> Vec<usize> {
        match self {
            Self::Tensor(tensor) => tensor.dims().to_vec(),
            Self::Packed(weight) => <[usize; 2]>::from(weight.dims()).to_vec(),
        }
    }

    /// Its dtype.
    pub fn dtype(&self) -> DType {
        match self {
            Self::Tensor(tensor) => tensor.dtype(),
            Self::Packed(_) => DType::F8E4M3,
        }
    }

    /// Bytes of memory that it takes.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Tensor(tensor) => tensor.elem_count() * tensor.dtype().size_in_bytes(),
            Self::Packed(weight) => weight.bytes(),
        }
    }
}

impl State {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a tensor under its full name, e.g. `model.norm.weight`.
    pub fn tensor(&mut self, name: impl Into<String>, tensor: &Tensor) {
        let tensor = StateTensor::Tensor(tensor.clone());
        self.0.insert(name.into(), tensor);
    }

    /// Adds the weight, the bias and the scale of the module `prefix`, e.g. `model.layers.0.mlp.up_proj`.
    pub fn linear(&mut self, prefix: &str, linear: &CtLinear) {
        let weight = match linear {
            CtLinear::Fp8(linear) => StateTensor::Packed(linear.packed_weight().clone()),
            CtLinear::Dense(linear) => StateTensor::Tensor(linear.weight().clone()),
        };
        self.0.insert(format!("{prefix}.weight"), weight);
        if let Some(bias) = linear.bias() {
            self.tensor(format!("{prefix}.bias"), bias);
        }
        if let CtLinear::Fp8(linear) = linear {
            self.tensor(format!("{prefix}.weight_scale"), linear.weight_scale());
        }
    }

    /// The tensor of that name.
    pub fn get(&self, name: &str) -> Option<&StateTensor> {
        self.0.get(name)
    }

    /// All names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }
}
